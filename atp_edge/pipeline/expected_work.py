"""What a run will do, work by work, for an estimate of the time left.

Units are passes of one block forward through the dense model. They are rough: a run measures its
own seconds a unit, so that only what is left against what is done has to be about right.
"""

from __future__ import annotations

from collections.abc import Sequence

from atp_edge.config import Config
from atp_edge.run.records import StageName

# Not measured on other machines: of a demo run on two CPU cores (docs/research/speed.md).
DENSE_STEP, JOINT_STEP, RECOVERY_STEP = 3.0, 5.5, 4.0
SCORED, REPAIRED, MATCHED = 3.0, 1.5, 4.0
ADAPTER_BLOCKS = 8
EXPORT, VERIFY, BENCH = 15.0, 90.0, 60.0
GATE = 240.0  # about 55,000 tokens, by each of the two models


def expected_work(
    config: Config, stages: Sequence[StageName], *, test_blocks: int | None = None
) -> list[tuple[str, float]]:
    """(name, units) in order: stages, phases, and what names itself by `atp_edge.run.watched`.

    test_blocks: of the test split; unknown, as many as the run asks for.
    """
    test = ("measuring", float(test_blocks or config.dataset.test_blocks))
    works: dict[str, list[tuple[str, float]]] = {
        "train": [("train", 1.0), *_training(config, test)],
        "shrink": [("shrink", 2.0), test],
        "export": [("export", EXPORT)],
        "verify": [("verify", VERIFY)],
        "bench": [("bench", BENCH)],
        "gate": [("gate", GATE)],
        "report": [("report", 1.0)],
    }
    return [work for stage in stages for work in works[stage]]


def _training(config: Config, test: tuple[str, float]) -> list[tuple[str, float]]:
    batch, joint = config.train.batch_blocks, config.control_steps
    matched = ("matching", MATCHED * min(config.recovery.approach_blocks, config.train_blocks))
    adapter = ("measuring", float(ADAPTER_BLOCKS))
    return [
        test,
        ("dense baseline", config.steps * batch * DENSE_STEP),
        test,
        ("scoring", config.decision.importance_blocks * SCORED),
        ("repairing", config.recovery.reconstruct_blocks * REPAIRED),
        matched,
        ("joint", joint * batch * JOINT_STEP),
        matched,
        test,
        ("recovery", (config.steps - joint) * batch * RECOVERY_STEP),
        test,
        *[adapter] * 3,
    ]
