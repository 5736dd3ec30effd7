"""The steps of a run as a user makes it, over the dense LoRA step: teacher, kept weights tuned, the
decision learned and the repair moved along, all by default settings.

A joint step is the mean over an interval: its LoRA steps, and the generator step before them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from atp_bench.clock import now
from atp_bench.interleaved_timing import interleaved_timing
from atp_bench.paired import paired_ratio
from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.decision.projection import project
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.plan import plan_of
from atp_edge.model.structures import Masks
from atp_edge.reconstruction.repair import Repair
from atp_edge.settings import with_values
from atp_edge.training.adapters import with_lora
from atp_edge.training.frozen import frozen_kind, load_base, pruned_kind, source_type
from atp_edge.training.learners import JointLearner, Tuner
from atp_edge.training.setup import accelerate

_STEPS = 1000
"""Of the run that these would be the first of: rates and strengths barely move."""
DENSE = "dense LoRA step"


def bench_run_steps(
    folder: str,
    *,
    kept: float,
    tokens: int,
    rounds: int,
    precision: str,
    decision: Masks | None = None,
) -> dict[str, Any]:
    """Medians in milliseconds, and ratios to the dense step with their quartiles, by step.

    decision: where the joint steps begin; random scores if it is None.
    """
    config = _settings(folder, kept, tokens, precision)
    steps = _steps(config, decision)
    found = interleaved_timing(steps, rounds)
    rows = {
        name: {
            "step_ms": statistics.median(each) * 1e3,
            "ratio": paired_ratio(each, found[DENSE]).median,
            "quartiles": paired_ratio(each, found[DENSE]).quartiles,
        }
        for name, each in found.items()
    }
    return {"rows": rows, "precision": precision, "rounds": rounds,
            "interval": config.decision.interval}  # fmt: skip


def _settings(folder: str, kept: float, tokens: int, precision: str) -> Config:
    return with_values(
        Config(),
        {
            "model": folder,
            "budget": f"params={kept}",
            "steps": _STEPS,
            "dataset.block_tokens": tokens,
            "train.batch_blocks": 1,
            "train.precision": "bf16" if precision == "bf16" else "no",
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What all learners read."""

    config: Config
    accelerator: Accelerator
    blocks: Blocks
    feasible: FeasibleDecisions
    teacher: Any

    def base(self) -> Any:
        kind = pruned_kind(self.config, source_type(Path(self.config.model)))
        return load_base(self.config, kind, self.accelerator)


def _steps(config: Config, decision: Masks | None) -> dict[str, Callable[[], float]]:
    accelerator = accelerate(config)
    dense = load_base(config, frozen_kind(config), accelerator)
    shape = model_shape(dense.config)
    made = _Made(
        config=config,
        accelerator=accelerator,
        blocks=_random_blocks(shape.vocabulary, config.dataset.block_tokens),
        feasible=feasible_decisions(
            shape, parse_budget(config.budget), widths="per-layer",
            width_multiple=min(config.decision.width_multiple, shape.layers[0].channels // 2),
        ),
        teacher=load_base(config, frozen_kind(config), accelerator),
    )  # fmt: skip
    tuner = Tuner(with_lora(config, dense), made.blocks, config, accelerator, phase="dense")
    joint, recovery = _joint(made, decision), _recovery(made, decision)
    return {
        DENSE: _timed(tuner.step, 1),
        "joint step": _timed(joint.step, config.decision.interval),
        "recovery step": _timed(recovery.step, 1),
    }


def _joint(made: _Made, decision: Masks | None) -> JointLearner:
    logits = _logits(made.feasible, decision)
    learner = JointLearner(
        with_lora(made.config, made.base()),
        DecisionGenerator(made.feasible.sites, logits),
        made.feasible,
        made.blocks,
        made.blocks,
        made.config,
        made.accelerator,
        teacher=made.teacher,
        retrain=made.config.recovery.retrain,
        importance=[x.exp() for x in logits],
    )
    count = made.config.recovery.reconstruct_blocks
    if count and made.config.repairs_along:
        with made.accelerator.autocast():
            sample = made.blocks.first(count)
            learner.repair = Repair(learner.model, learner.masks, sample, follows=True)
    return learner


def _recovery(made: _Made, decision: Masks | None) -> Tuner:
    masks = project(_logits(made.feasible, decision), made.feasible).masks
    wide = with_lora(made.config, made.base())
    plan = plan_of(model_shape(wide.get_base_model().config), masks.kept(), "groups")
    return Tuner(
        narrow_peft(wide, plan, take=True), made.blocks, made.config, made.accelerator,
        phase="recovery", teacher=made.teacher, retrain=made.config.recovery.retrain,
    )  # fmt: skip


def _logits(feasible: FeasibleDecisions, decision: Masks | None) -> list[torch.Tensor]:
    """Of random scores, those of the decision's structures above all others."""
    draw = torch.Generator().manual_seed(0)
    scores = [torch.rand(site.size, generator=draw) for site in feasible.sites]
    if decision is None:
        return scores
    return [x + mask.cpu().float() for x, mask in zip(scores, decision, strict=True)]


def _random_blocks(vocabulary: int, tokens: int) -> Blocks:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary, (32, tokens), generator=draw)
    return Blocks(input_ids=ids, labels=ids)


def _timed(step: Callable[[int], Any], count: int) -> Callable[[], float]:
    """Seconds of a step, the mean over `count` of them; every call goes on where the last was."""
    done = 0

    def run() -> float:
        nonlocal done
        began = now()
        for index in range(done, done + count):
            step(index)
        done += count
        return (now() - began) / count

    return run


def run_steps_table(figures: dict[str, Any]) -> Table:
    """A row a step."""
    shown = Table(
        title=f"A run's own steps, {figures['precision']}: ms, and over the dense LoRA step",
        title_justify="left",
    )
    shown.add_column("step", overflow="fold")
    for name in ("ms", "ratio", "quartiles"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in figures["rows"].items():
        low, high = row["quartiles"]
        shown.add_row(name, f"{row['step_ms']:.0f}", f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}")
    return shown
