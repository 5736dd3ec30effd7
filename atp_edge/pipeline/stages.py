"""The stages of a run in their order: each reads the run's folder and adds to it.

Each can be run again alone. A stage is imported when it runs: what one needs, others need not load.
"""

from __future__ import annotations

from collections.abc import Callable

from atp_edge.config import Config
from atp_edge.run.folder import AFTER, RunFolder, StageName
from atp_edge.run.progress import Progress

Stage = Callable[[Config, RunFolder, Progress], None]


def run_stage(name: StageName, config: Config, run: RunFolder, progress: Progress) -> None:
    """One stage of a run. Raises ValueError when the one whose work it reads has not ended."""
    before = AFTER.get(name)
    if before and before not in run.metrics():
        raise ValueError(
            f"{run.path}: {name} reads what {before} leaves, and {before} has not ended; run "
            f"{run.command(before)}"
        )
    _stage(name)(config, run, progress)


def _stage(name: StageName) -> Stage:
    match name:
        case "train":
            from atp_edge.pipeline.train import train

            return train
        case "shrink":
            from atp_edge.pipeline.shrink import shrink

            return shrink
        case "export":
            from atp_edge.pipeline.export import export

            return export
        case "verify":
            from atp_edge.pipeline.verify import verify

            return verify
        case "bench":
            from atp_edge.pipeline.bench import bench

            return bench
        case "report":
            from atp_edge.pipeline.report import report

            return report
