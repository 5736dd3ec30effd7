"""Training runs of the matrix, cell by cell.

A cell is one training run. Cells of a domain, seed, length and batch share one dense baseline.
Every finished cell is in the results file at once: a killed matrix goes on where it was. Several
processes may work on one matrix: each takes a cell that no other has.

`atp-edge bench quality --preset cpu --json FILE` (gpu, quick) writes the results.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from atp_bench.quality.cells import LAYERS, Cell
from atp_bench.quality.results import Result, add_result, read_results
from atp_bench.tasks import recovery_where_able, tasks_of
from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.data.splits import Splits
from atp_edge.decision.baselines import without_least_layers
from atp_edge.evaluation.items import Task
from atp_edge.evaluation.task_scores import TaskScore, evaluate
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.families import longest_text, model_shape
from atp_edge.model.narrow import merge
from atp_edge.model.plan import shares
from atp_edge.run.errors import TakenError
from atp_edge.run.files import file_lock
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.run.precision import settled
from atp_edge.run.progress import Progress
from atp_edge.settings import with_values
from atp_edge.training.adapters import with_lora
from atp_edge.training.learners import Tuner
from atp_edge.training.measure import figures_of, loss_of
from atp_edge.training.narrow_state import load_narrow_peft, load_tuned
from atp_edge.training.phases import drive, run_part
from atp_edge.training.setup import (
    TrainContext,
    accelerate,
    feasible_of,
    load_dense,
    placed,
    splits_of,
    tokenizer_of,
)

# Settings that a dense baseline does not read.
UNREAD_BY_DENSE = ("budget", "widths", "recipe", "decision", "recovery", "export", "bench")


def run_matrix(
    cells: Iterable[Cell],
    *,
    work: Path,
    results: Path,
    progress: Progress,
    base: Config | None = None,
    items: int = 50,
    blocks: int = 40,
    keep: bool = False,
) -> list[Result]:
    """Run every cell that the results file lacks and no other process is at; returns all results
    of these cells.

    work: where runs lie. results: JSON, written after every cell. items: of every task, at most.
    blocks: of the test split, at most, where more than `dataset.test_blocks`. keep: leave a
    finished cell's run where it is, for `atp-edge run` to go on from; when more items or blocks are
    asked of it than it was scored by, it is scored again and not trained again.
    """
    base = settled(base or Config())
    wanted = list(dict.fromkeys(cells))
    for cell in wanted:
        run = work / cell.key.replace("/", "_").replace(" ", "-")
        try:
            with file_lock(run):
                known = read_results(results).get(cell.key)
                if known and not (run.exists() and (known.items < items or known.blocks < blocks)):
                    continue
                progress.say(cell.key)
                add_result(results, _run_cell(cell, base, known, items, blocks, run, progress))
                if not keep:
                    shutil.rmtree(run)
        except TakenError:
            progress.say(f"{cell.key}: another process is at it")
    found = read_results(results)
    return [found[cell.key] for cell in wanted if cell.key in found]


# Cells of a domain, seed and length follow one another; each may be tested on more blocks too.
_splits = lru_cache(maxsize=2)(splits_of)
_tasks = lru_cache(maxsize=1)(tasks_of)


def _run_cell(
    cell: Cell,
    base: Config,
    known: Result | None,
    items: int,
    blocks: int,
    folder: Path,
    progress: Progress,
) -> Result:
    config = cell.config(base)
    if known:
        items, blocks = max(items, known.items), max(blocks, known.blocks)
    base = with_values(base, cell.shared)
    splits, accelerator = _splits(base), accelerate(config)
    dense = _dense_baseline(config, base, splits, accelerator, folder.parent, progress)
    run, reference = _run_beside(dense, config, folder)
    train = _without_layers if cell.method == LAYERS else _with_plan
    context = TrainContext(
        config=config, run=run, splits=splits, accelerator=accelerator, progress=progress
    )
    trained = train(context)
    slim, figures = trained.slim, trained.figures
    if blocks > config.dataset.test_blocks:
        progress.say("testing on more blocks")
        test = _splits(with_values(base, {"dataset.test_blocks": blocks})).test
        reference = _dense_figures(dense, test, accelerator)
        figures |= figures_of(loss_of(slim, test, accelerator))
        figures["perplexity_at_freeze"] = trained.perplexity_at_freeze(test)
    if known and known.items == items:
        scores = known.tasks
    else:
        progress.say("scoring the tasks")
        tasks, notes = _tasks(base, items, longest_text(slim.config))
        for note in notes:
            progress.say(note)
        scores = _task_recovery(dense, slim, tasks, config, accelerator)
    return Result(
        cell=cell,
        dense_perplexity=reference["perplexity"],
        dense_block_losses=reference["block_losses"],
        recovery=reference["perplexity"] / figures["perplexity"],
        tasks=scores,
        items=items,
        blocks=blocks,
        tokens=config.train_tokens,
        precision=config.train.precision,
        **figures,
    )


def _run_beside(dense: RunFolder, config: Config, folder: Path) -> tuple[RunFolder, dict[str, Any]]:
    """A cell's run with the dense baseline in it, and the figures of that.

    A kept run is then like any other: `atp-edge run --config` goes on from it.
    """
    run = open_run(with_values(config, {"out": str(folder)}))
    if not run.dense.exists():
        run.dense.symlink_to(dense.dense.resolve(), target_is_directory=True)
    reference = dense.parts()["tune_dense"]
    run.add_part("tune_dense", reference)
    return run, reference


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A slim model, the figures of its training, and how to test it as it was at the freeze."""

    slim: PreTrainedModel
    figures: dict[str, Any]
    perplexity_at_freeze: Callable[[Blocks], float]


def _with_plan(context: TrainContext) -> Trained:
    """The slim model of a decision over structures, and the figures of its training."""
    decided, recovered = (run_part(name, context) for name in ("learn_decision", "recover"))

    def at_freeze(test: Blocks) -> float:
        frozen = load_narrow_peft(context.config, context.run, "frozen")
        placed(frozen.get_base_model(), context.accelerator)
        return loss_of(frozen, test, context.accelerator).perplexity

    return Trained(
        slim=merge(load_tuned(context.config, context.run)),
        figures={
            "perplexity_at_freeze": decided["perplexity"],
            "perplexity": recovered["perplexity"],
            "block_losses": recovered["block_losses"],
            "decoder_share": decided["decoder_share"],
            "whole_share": decided["whole_share"],
            "seconds": decided["seconds"] + recovered["seconds"],
        },
        perplexity_at_freeze=at_freeze,
    )


def _without_layers(context: TrainContext) -> Trained:
    """The dense model without its layers of least influence, then tuned by LoRA."""
    began = time.perf_counter()
    config, splits, accelerator = context.config, context.splits, context.accelerator
    dense = placed(load_dense(config), accelerator)
    feasible = feasible_of(config, dense.config)
    sample = splits.train.spread(config.decision.importance_blocks)
    with accelerator.autocast():
        slim = without_least_layers(dense, sample, feasible)
    kept = shares(model_shape(dense.config), model_shape(slim.config))
    tuned = with_lora(config, slim)

    def at_freeze(test: Blocks) -> float:
        with tuned.disable_adapter():
            return loss_of(tuned, test, accelerator).perplexity

    cut = at_freeze(splits.test)
    learner = Tuner(
        tuned, splits.train, config, accelerator, phase="recovery", validation=splits.validation
    )
    context.progress.phase("recovery", 0, config.steps, None)
    drive(learner, context)
    after = loss_of(tuned, splits.test, accelerator)
    return Trained(
        slim=merge(tuned),
        figures={
            "perplexity_at_freeze": cut,
            "decoder_share": kept.decoder,
            "whole_share": kept.whole,
            "seconds": time.perf_counter() - began,
            **figures_of(after),
        },
        perplexity_at_freeze=at_freeze,
    )


def _dense_figures(dense: RunFolder, test: Blocks, accelerator: Accelerator) -> dict[str, Any]:
    """The dense model's loss on these blocks."""

    def tested() -> dict[str, Any]:
        return figures_of(loss_of(placed(load_narrow(dense.dense), accelerator), test, accelerator))

    return _once(dense, f"test-{len(test.input_ids)}", tested)


def _once(dense: RunFolder, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured of a dense model; kept in its folder, for its cells share it."""
    with file_lock(dense.path, waiting=lambda: None):
        if name not in dense.parts():
            dense.add_part(name, measure())
        return dense.parts()[name]


def _task_recovery(
    dense: RunFolder,
    slim: PreTrainedModel,
    tasks: list[Task],
    config: Config,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Scores of both models on the same items."""
    tokenizer = tokenizer_of(config)

    def scored(model: PreTrainedModel) -> dict[str, TaskScore]:
        with accelerator.autocast():
            return evaluate(model.to(accelerator.device), tokenizer, tasks)

    def of_dense() -> dict[str, Any]:
        return {key: asdict(score) for key, score in scored(load_narrow(dense.dense)).items()}

    shared = _once(dense, f"tasks-{sum(len(task.items) for task in tasks)}", of_dense)
    reference = {key: TaskScore(**score) for key, score in shared.items()}
    return asdict(recovery_where_able(reference, scored(slim)))


def _dense_baseline(
    config: Config,
    base: Config,
    splits: Splits,
    accelerator: Accelerator,
    work: Path,
    progress: Progress,
) -> RunFolder:
    """The dense model tuned with the cell's data, seed, rank and tokens; shared by its cells."""
    parts = (
        *(Path(config.data).stem, config.seed, config.steps, config.train.batch_blocks),
        config.lora.rank,
        *([config.dataset.train_documents] if config.dataset.train_documents else []),
    )
    made = RunFolder(work / "_".join(map(str, ("dense", *parts))))
    with file_lock(made.path, waiting=lambda: progress.say(f"waiting for {made.path}")):
        # What it does not read may have had other defaults when it was tuned.
        unread = made.config() if made.config_toml.is_file() else base
        shared = replace(
            config,
            out=str(made.path),
            **{name: getattr(unread, name) for name in UNREAD_BY_DENSE},
        )
        run = open_run(shared)
        context = TrainContext(
            config=shared, run=run, splits=splits, accelerator=accelerator, progress=progress
        )
        run_part("tune_dense", context)
        for left in run.checkpoint.glob("*.pt"):
            left.unlink()
    return run
