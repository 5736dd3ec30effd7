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
_NAME = "lm-eval "


def check_outside(
    dense: LanguageModel, slim: LanguageModel, tokenizer: Any, tasks: Sequence[Any],
    limits: TaskLimits, level: float, window: int,
) -> tuple[list[Check], list[str]]:  # fmt: skip
    """A check for every metric that lm-eval gives an error for: paired item by item where it tells
    them, else with the errors of both; undecided ones for a metric of which nobody says which way
    is better, and for a task without any. And what is to be said of prompts that were cut and of
    metrics that do not count."""
    from atp_bench.lm_eval_adapter import HarnessModel, harness_scores

    harnesses = [HarnessModel(m, tokenizer, window=window) for m in (dense, slim)]
    scored = [harness_scores(h, tasks, items=limits.lm_eval_items) for h in harnesses]
    checks: list[Check] = []
    read, uncounted = set[str](), list[str]()
    for before, after in zip(*scored, strict=True):
        if before.higher_is_better is None:
            checks.append(_of_no_direction(before, after))
        elif (difference := _difference(before, after)) is None:
            uncounted.append(f"{before.task} {before.metric}")
            continue
        else:
            checks.append(_judged(before, after, difference, limits.lm_eval_loss, level))
        read.add(before.task)
    checks += [_without_metric(task) for task in map(_name_of, tasks) if task not in read]
    notes = list(harnesses[0].notes)
    if uncounted:
        notes.append(
            "lm-eval metrics of no known error, or without a number from the dense model, are not "
            f"judged: {', '.join(uncounted)}"
        )
    return checks, notes


def _judged(
    before: HarnessScore, after: HarnessScore, difference: Difference, margin: float, level: float
) -> Check:
    one = judged(difference, margin=margin, level=level, fewest=FEWEST_ITEMS)
    check = of_judged(
        f"{_NAME}{before.task} {before.metric}", one,
        what=f"lm-eval {before.task}, {before.metric} lost", unit="of 1",
        clusters="items", dense=before.value, slim=after.value,
    )  # fmt: skip
    return with_enough(check, 1.0, level, "items")


def _of_no_direction(before: HarnessScore, after: HarnessScore) -> Check:
    """Undecided: a metric of which nobody says whether more of it is better."""
    return Check(
        name=f"{_NAME}{before.task} {before.metric}",
        status="undecided",
        text=f"lm-eval {before.task}, {before.metric}: {before.value:.3f} before, "
        f"{after.value:.3f} after; nobody says whether more of it is better: say higher_is_better "
        "in the task's metric_list",
        dense=before.value,
        slim=after.value,
        items=before.items,
        clusters=before.items,
    )


def _without_metric(task: str) -> Check:
    """Undecided: a task that was asked for and none of whose metrics can be judged."""
    return Check(
        name=f"{_NAME}{task}",
        status="undecided",
        text=f"lm-eval {task}: no metric of it is a mean over items or has a standard error; add "
        "one to its metric_list",
    )


def _name_of(task: Any) -> str:
    """What lm-eval calls a task in its results."""
    return str(task.config.task)


def _difference(before: HarnessScore, after: HarnessScore) -> Difference | None:
    """What the slim model lost, no number where it gives none; None where nobody tells how sure
    that is, or the dense model gives no number."""
    sign, items = 1 if before.higher_is_better else -1, min(before.items, after.items)
    if not math.isfinite(before.value):
        return None
    if not math.isfinite(after.value):
        return Difference(mean=math.nan, error=math.inf, clusters=items, items=items)
    if before.per_item and len(before.per_item) == len(after.per_item):
        lost = [sign * (a - b) for a, b in zip(before.per_item, after.per_item, strict=True)]
        return clustered(lost, [1] * len(lost), list(range(len(lost))))
    if before.error is None or after.error is None:
        return None
    error = math.hypot(before.error, after.error)
    if not math.isfinite(error):
        return None
    return Difference(
        mean=sign * (before.value - after.value),
        error=error,
        clusters=items,
        items=items,
    )
