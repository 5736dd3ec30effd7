"""Quality at equal tokens: ATP, its ablations and the two-stage ways, cell by cell.

A cell is one training run. Cells of a domain, seed and length share one dense baseline. Every
finished cell is in the results file at once, so that a killed matrix goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from atp_bench.environment import environment
from atp_edge.config import Config, with_values
from atp_edge.data import Splits
from atp_edge.files import read_json, write_atomically
from atp_edge.progress import Progress
from atp_edge.run_folder import RunFolder, open_run
from atp_edge.train_stage import accelerate, learn_decision, recover, splits_of, tune_dense

Preset = Literal["quick", "cpu", "gpu"]
# The decision is made before anything is tuned; then the cut model is tuned by LoRA alone.
TWO_STAGE = {
    "decision.learn": False,
    "decision.control_share": 0.0,
    "recovery.reconstruct_blocks": 0,
    "recovery.retrain": False,
    "recovery.distill": 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "atp": {},
    # The same recipe, its decision frozen at the start: with the same phases, and cut at once.
    "frozen": {"decision.learn": False},
    "frozen, cut at once": {"decision.learn": False, "decision.control_share": 0.0},
    "two-stage: taylor": TWO_STAGE,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "plain masking": {"decision.placement": "whole"},
    "group lasso": {"decision.regularizer": "lasso"},
    "no regularizer": {"decision.regularizer": "none"},
    "penalty alone": {"decision.projection": False},
    "sampled decisions": {"decision.noise": 1.0},
    "start: all kept": {"decision.start": "all-kept"},
    "refresh every step": {"decision.interval": 1},
    "refresh every 4": {"decision.interval": 4},
    "no reconstruction": {"recovery.reconstruct_blocks": 0},
    "no distillation": {"recovery.distill": 0.0},
    "LoRA alone": {"recovery.retrain": False},
    "LoRA alone, rank 64": {"recovery.retrain": False, "lora.rank": 64, "lora.alpha": 128.0},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the matrix; `share`: of the decoder's parameters that stay."""

    method: str
    domain: str
    seed: int
    share: float
    widths: str
    steps: int

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())

    def config(self, base: Config) -> Config:
        """The settings of this run. Raises ValueError for a method that is none."""
        known = METHODS | ABLATIONS
        if self.method not in known:
            raise ValueError(f"method {self.method!r}: expected one of {', '.join(known)}")
        own = {
            "data": self.domain,
            "seed": self.seed,
            "budget": f"params={self.share}",
            "widths": self.widths,
            "steps": self.steps,
        }
        return with_values(base, own | known[self.method])


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell gave, on the test split. recovery: dense over slim perplexity."""

    cell: Cell
    dense_perplexity: float
    perplexity_at_freeze: float
    perplexity: float
    recovery: float
    decoder_share: float
    whole_share: float
    tokens: int
    seconds: float


def matrix(preset: Preset) -> list[Cell]:
    """The cells of a preset: `quick` in minutes for CI, `cpu` in hours, `gpu` the full matrix."""

    def cells(
        methods: Iterable[str],
        *,
        domains: Iterable[str] = ("legal", "health"),
        seeds: Iterable[int] = (0,),
        shares: Iterable[float] = (0.6,),
        widths: Iterable[str] = ("per-layer",),
        steps: int = 200,
    ) -> list[Cell]:
        return [
            Cell(method=method, domain=domain, seed=seed, share=share, widths=width, steps=steps)
            for seed in seeds
            for domain in domains
            for share in shares
            for width in widths
            for method in methods
        ]

    main = ("atp", "frozen", "frozen, cut at once", "two-stage: taylor")
    match preset:
        case "quick":
            return cells(("atp", "two-stage: taylor"), domains=("legal",), steps=8)
        case "cpu":
            return [
                *cells(main, seeds=(0, 1, 2)),
                *cells(("atp",), domains=("legal",), steps=400),
                *cells(("atp",), shares=(0.8, 0.5)),
                *cells(("atp",), domains=("legal",), widths=("uniform",)),
                *cells(METHODS, domains=("legal",)),
                *cells(ABLATIONS, domains=("legal",)),
                *cells(("atp",), domains=("legal",), steps=1600),
            ]
        case "gpu":
            return [
                *cells(
                    METHODS,
                    seeds=(0, 1, 2),
                    shares=(0.8, 0.6, 0.5),
                    widths=("per-layer", "uniform"),
                ),
                *cells(ABLATIONS, seeds=(0, 1, 2)),
                *cells(main, steps=1600, seeds=(0, 1, 2)),
                *cells(("atp",), steps=40_000),
            ]


def run_matrix(
    cells: Iterable[Cell],
    *,
    work: Path,
    results: Path,
    progress: Progress,
    base: Config | None = None,
    after: Callable[[list[Result]], None] = lambda found: None,
) -> list[Result]:
    """Run every cell that the results file lacks; returns all results of these cells.

    work: where runs lie while they run; a finished cell's folder is removed. results: JSON, written
    after every cell. after: called with all results so far.
    """
    base = base or Config()
    wanted = list(dict.fromkeys(cells))
    found = read_results(results)
    for cell in wanted:
        if cell.key in found:
            continue
        progress.say(cell.key)
        found[cell.key] = _run_cell(cell, base, work, progress)
        _write_results(results, found)
        after([found[c.key] for c in wanted if c.key in found])
    return [found[cell.key] for cell in wanted]


def read_results(path: Path) -> dict[str, Result]:
    """Results by their cells' keys; none when there is no file."""
    rows = read_json(path).get("results", [])
    made = [Result(**row | {"cell": Cell(**row["cell"])}) for row in rows]
    return {result.cell.key: result for result in made}


def _write_results(path: Path, found: Mapping[str, Result]) -> None:
    content = {"environment": environment(), "results": [asdict(r) for r in found.values()]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _run_cell(cell: Cell, base: Config, work: Path, progress: Progress) -> Result:
    config = cell.config(base)
    splits = splits_of(config)
    accelerator = accelerate(config)
    dense = _dense_baseline(config, base, splits, accelerator, work, progress)
    folder = work / cell.key.replace("/", "_").replace(" ", "-")
    run = open_run(with_values(config, {"out": str(folder)}))
    if not run.dense.exists():
        run.dense.symlink_to(dense.dense.resolve(), target_is_directory=True)
    began = time.perf_counter()
    for part in (learn_decision, recover):
        if part.__name__ not in run.parts():
            run.add_part(part.__name__, part(config, run, splits, accelerator, progress))
    parts = run.parts()
    reference = dense.parts()["tune_dense"]["perplexity"]
    slim = parts["recover"]["perplexity"]
    result = Result(
        cell=cell,
        dense_perplexity=reference,
        perplexity_at_freeze=parts["learn_decision"]["perplexity"],
        perplexity=slim,
        recovery=reference / slim,
        decoder_share=parts["learn_decision"]["decoder_share"],
        whole_share=parts["learn_decision"]["whole_share"],
        tokens=config.steps * config.train.batch_blocks * config.dataset.block_tokens,
        seconds=time.perf_counter() - began,
    )
    shutil.rmtree(folder)
    return result


def _dense_baseline(
    config: Config,
    base: Config,
    splits: Splits,
    accelerator: Accelerator,
    work: Path,
    progress: Progress,
) -> RunFolder:
    """The dense model tuned with the cell's data, seed, rank and tokens; shared by its cells."""
    name = f"dense_{Path(config.data).stem}_{config.seed}_{config.steps}_{config.lora.rank}"
    shared = replace(
        config,
        budget=base.budget,
        widths=base.widths,
        decision=base.decision,
        recovery=base.recovery,
        out=str(work / name),
    )
    run = open_run(shared)
    if "tune_dense" not in run.parts():
        run.add_part("tune_dense", tune_dense(shared, run, splits, accelerator, progress))
        for left in run.checkpoint.glob("*.pt"):
            left.unlink()
    return run


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of one method over seeds."""

    method: str
    domain: str
    share: float
    widths: str
    steps: int
    seeds: int
    perplexity: float
    dense_perplexity: float
    recovery: float
    recovery_spread: tuple[float, float]
    """Lowest and highest of the seeds."""
    whole_share: float


def summarize(results: Iterable[Result]) -> list[Summary]:
    """Means over seeds, best method first within a domain, share, widths and length."""
    groups: dict[tuple[str, float, str, int, str], list[Result]] = {}
    for r in results:
        c = r.cell
        groups.setdefault((c.domain, c.share, c.widths, c.steps, c.method), []).append(r)
    made = [
        Summary(
            method=method,
            domain=domain,
            share=share,
            widths=widths,
            steps=steps,
            seeds=len(rows),
            perplexity=statistics.mean(r.perplexity for r in rows),
            dense_perplexity=statistics.mean(r.dense_perplexity for r in rows),
            recovery=statistics.mean(r.recovery for r in rows),
            recovery_spread=(min(r.recovery for r in rows), max(r.recovery for r in rows)),
            whole_share=statistics.mean(r.whole_share for r in rows),
        )
        for (domain, share, widths, steps, method), rows in groups.items()
    ]
    return sorted(made, key=lambda s: (s.domain, -s.share, s.widths, s.steps, -s.recovery))
