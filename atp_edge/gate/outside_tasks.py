"""lm-eval's tasks from disk, dense and slim, in the same verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from atp_edge.evaluation.scoring import LanguageModel
from atp_edge.gate.results import Check, of_judged
from atp_edge.gate.settings import TaskLimits
from atp_edge.gate.statistics import Difference, judged


def check_outside(
    dense: LanguageModel, slim: LanguageModel, tokenizer: Any, tasks: Sequence[Any],
    limits: TaskLimits, level: float, window: int,
) -> list[Check]:  # fmt: skip
    """A check for every metric that lm-eval gives an error for. Its items are not paired here, so
    that the error is larger than it need be: it fails later, never sooner."""
    from atp_bench.lm_eval_adapter import HarnessModel, harness_scores

    scored = [
        harness_scores(HarnessModel(m, tokenizer, window=window), tasks, items=limits.lm_eval_items)
        for m in (dense, slim)
    ]
    checks = []
    for before, after in zip(*scored, strict=True):
        if before.error is None or after.error is None:
            continue
        sign = 1 if before.higher_is_better else -1
        difference = Difference(
            mean=sign * (before.value - after.value),
            error=math.hypot(before.error, after.error),
            clusters=limits.lm_eval_items,
            items=limits.lm_eval_items,
        )
        one = judged(difference, margin=limits.lm_eval_loss, level=level, fewest=2)
        checks.append(
            of_judged(
                f"lm-eval {before.task} {before.metric}", one,
                what=f"lm-eval {before.task}, {before.metric} lost", unit="of 1",
                clusters="items", dense=before.value, slim=after.value,
            )
        )  # fmt: skip
    return checks
