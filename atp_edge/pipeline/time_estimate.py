"""How long a run will take on this machine, and what a longer one would give: for `--dry-run`.

A block is read once by the dense model and timed; what the stages do is known in such passes
(atp_edge.pipeline.expected_work), roughly.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from atp_edge.config import Config
from atp_edge.data.splits import Splits
from atp_edge.evaluation.text_loss import text_loss
from atp_edge.model.families import model_shape
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.device import Device
from atp_edge.pipeline.expected_work import expected_work
from atp_edge.run import ranks
from atp_edge.run.records import STAGES, StageName
from atp_edge.run.time_left import in_words
from atp_edge.training.setup import accelerate, load_dense, placed, source_config

FP32_BYTES = 4
ROOM = 0.4
"""Share of the memory that the model may take in fp32 to be loaded for an estimate."""
MOST_ON_A_CPU = 2e9
"""Parameters."""
MEASURED_BY_TOKENS = ((51_200, 0.714), (102_400, 0.775), (204_800, 0.828), (819_200, 0.881))
"""(tokens, recovery): SmolLM2-135M on `legal`, 40 % cut, seed 0 (docs/recovery.md)."""
MEASURED_BY_DOCUMENTS = (
    (30, 67_657, 0.700),
    (100, 203_386, 0.721),
    (300, 576_256, 0.750),
    (1_000, 1_789_293, 0.762),
    (1_623, 2_097_152, 0.775),
)
"""(documents of the train split, their tokens, recovery): the same after 102,400 tokens."""
LITTLE_TEXT = 1_000_000
"""Tokens of a train split, below which more text is worth speaking of."""


def time_lines(
    config: Config, stages: Sequence[StageName], splits: Splits, device: Device
) -> list[str]:
    """What `--dry-run` says of time and length, a line each."""
    seconds = pass_seconds(config, splits, device)
    if seconds is None:
        said = "time: not estimated (a large model for this machine, or several ranks)"
    else:
        found = stage_seconds(config, stages, seconds, len(splits.test.input_ids))
        each = ", ".join(f"{name} {in_words(part)}" for name, part in found.items() if part >= 60)
        said = f"time, roughly: {in_words(sum(found.values()))} ({each or 'no stage a minute'})"
    lines = [
        said,
        f"a longer run (--steps) recovers more: this one reads {config.train_tokens:,} "
        "tokens; SmolLM2-135M, 40 % cut, licence texts, by tokens: "
        f"{_curve(MEASURED_BY_TOKENS)} (docs/recovery.md)",
    ]
    if (there := splits.report.tokens["train"]) < LITTLE_TEXT:
        of_size = [(tokens, recovery) for _, tokens, recovery in MEASURED_BY_DOCUMENTS]
        lines.append(
            f"so does more text: this train split has {there:,} tokens; the same model after 102 k "
            f"tokens, by the size of its train split: {_curve(of_size)}"
        )
    return lines


def _curve(points: Iterable[tuple[int, float]]) -> str:
    """Recovery by tokens, in words."""
    return ", ".join(f"{tokens / 1000:,.0f} k {recovery:.2f}" for tokens, recovery in points)


def pass_seconds(config: Config, splits: Splits, device: Device) -> float | None:
    """Seconds of one block through the dense model; None where that would take long by itself, and
    on several ranks, which share the blocks."""
    parameters = count_parameters(model_shape(source_config(config))).whole
    large = FP32_BYTES * parameters > ROOM * min(device.memory, device.host)
    slow = device.kind == "cpu" and parameters > MOST_ON_A_CPU
    if large or slow or ranks.size() > 1:
        return None
    accelerator = accelerate(config)
    model = placed(load_dense(config), accelerator)
    timed = []
    for _ in range(2):  # The first one is slower than any after it.
        began = time.perf_counter()
        with accelerator.autocast():
            text_loss(model, splits.train.first(1))
        timed.append(time.perf_counter() - began)
    return min(timed)


def stage_seconds(
    config: Config, stages: Sequence[StageName], pass_seconds: float, test_blocks: int
) -> dict[str, float]:
    """Seconds of every stage."""
    found: dict[str, float] = {}
    stage = ""
    for name, units in expected_work(config, stages, test_blocks=test_blocks):
        stage = name if name in STAGES else stage
        found[stage] = found.get(stage, 0.0) + units * pass_seconds
    return found
