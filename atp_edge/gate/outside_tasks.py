"""lm-eval's tasks from disk, dense and slim, in the same verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atp_edge.evaluation.scoring import LanguageModel
from atp_edge.gate.results import Check, of_judged
from atp_edge.gate.settings import TaskLimits
from atp_edge.gate.statistics import Difference, clustered, judged
from atp_edge.gate.tasks import with_enough

if TYPE_CHECKING:  # lm-eval is an extra
    from atp_bench.lm_eval_adapter import HarnessScore

FEWEST_ITEMS = 20


def check_outside(
    dense: LanguageModel, slim: LanguageModel, tokenizer: Any, tasks: Sequence[Any],
    limits: TaskLimits, level: float, window: int,
) -> tuple[list[Check], list[str]]:  # fmt: skip
    """A check for every metric that lm-eval gives an error for: paired item by item where it tells
    them, else with the errors of both. And what is to be said of prompts that were cut."""
    from atp_bench.lm_eval_adapter import HarnessModel, harness_scores

    harnesses = [HarnessModel(m, tokenizer, window=window) for m in (dense, slim)]
    scored = [harness_scores(h, tasks, items=limits.lm_eval_items) for h in harnesses]
    checks = []
    for before, after in zip(*scored, strict=True):
        difference = _difference(before, after)
        if difference is None:
            continue
        one = judged(difference, margin=limits.lm_eval_loss, level=level, fewest=FEWEST_ITEMS)
        check = of_judged(
            f"lm-eval {before.task} {before.metric}", one,
            what=f"lm-eval {before.task}, {before.metric} lost", unit="of 1",
            clusters="items", dense=before.value, slim=after.value,
        )  # fmt: skip
        checks.append(with_enough(check, 1.0, level, "items"))
    return checks, harnesses[0].notes


def _difference(before: HarnessScore, after: HarnessScore) -> Difference | None:
    """What the slim model lost; None where nobody tells how sure that is."""
    sign = 1 if before.higher_is_better else -1
    if before.per_item and len(before.per_item) == len(after.per_item):
        lost = [sign * (a - b) for a, b in zip(before.per_item, after.per_item, strict=True)]
        return clustered(lost, [1] * len(lost), list(range(len(lost))))
    if before.error is None or after.error is None:
        return None
    return Difference(
        mean=sign * (before.value - after.value),
        error=math.hypot(before.error, after.error),
        clusters=min(before.items, after.items),
        items=min(before.items, after.items),
    )
