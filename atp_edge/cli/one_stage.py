"""A stage of a run, again and alone: `shrink`, `export`, `verify` and `report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from atp_edge.run.records import WORK, StageName

console = Console(highlight=False, emoji=False)


def one_stage(name: StageName, out: Path) -> None:
    """Run one stage again on a run's folder."""
    from atp_edge.pipeline.stages import run_stage, taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    folder, source = RunFolder(out), name in WORK and WORK[name].source
    with Terminal(console) as progress, taken_up(folder, progress, source=source) as config:
        run_stage(name, config, folder, progress)
