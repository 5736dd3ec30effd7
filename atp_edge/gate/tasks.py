"""Scores on tasks against their margins: choices, generation, slices, right answers lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from atp_edge.gate.answered import Answered, corrected
from atp_edge.gate.results import Check, of_judged
from atp_edge.gate.settings import TaskLimits
from atp_edge.gate.statistics import (
    Difference,
    Status,
    clustered,
    fewest_that_tell,
    judged,
    judged_family,
    mcnemar,
)


def check_tasks(
    items: Sequence[Answered], limits: TaskLimits, level: float
) -> tuple[list[Check], dict[str, Any]]:
    """Chance-corrected scores, clustered by document; McNemar over all choices."""
    kinds = {"choice": limits.choice, "generation": limits.generation}
    checks = []
    for kind, margin in kinds.items():
        of = [item for item in items if item.generated == (kind == "generation")]
        if not of:
            checks.append(_none(kind))
            continue
        one = judged(lost(of), margin=margin, level=level, fewest=limits.fewest_documents)
        check = of_judged(
            kind, one, what=f"{kind} tasks, score above chance lost", unit="of 1",
            dense=corrected(of, 0), slim=corrected(of, 1),
        )  # fmt: skip
        checks.append(_told(check, of, level))
    checks += _slices(items, limits, level)
    checks += _right_answers([item for item in items if not item.generated], limits, level)
    names = dict.fromkeys(item.task for item in items)
    figures = {name: _figures([x for x in items if x.task == name]) for name in names}
    return checks, figures


def lost(items: Sequence[Answered]) -> Difference:
    """The mean score above chance that the slim model lost."""
    return clustered([x.lost for x in items], [1] * len(items), [x.document for x in items])


def _figures(items: Sequence[Answered]) -> dict[str, float]:
    return {
        "items": len(items),
        "chance": items[0].chance,
        "dense": sum(x.score[0] for x in items) / len(items),
        "slim": sum(x.score[1] for x in items) / len(items),
    }


def _none(kind: str) -> Check:
    text = f"{kind} tasks: the test documents give no item; give more or longer documents"
    return Check(name=kind, status="undecided", text=text)


def _slices(items: Sequence[Answered], limits: TaskLimits, level: float) -> list[Check]:
    names = sorted({item.slice for item in items})
    if len(names) < 2:
        return []
    family = {name: lost([x for x in items if x.slice == name]) for name in names}
    found = judged_family(family, margin=limits.slice, level=level, fewest=limits.fewest_documents)
    checks = []
    for name, one in found.items():
        of = [x for x in items if x.slice == name]
        check = of_judged(
            "tasks", one, what=f"tasks of {name!r}", unit="of 1", slice=name, required=False,
            dense=corrected(of, 0),
        )  # fmt: skip
        checks.append(_told(check, of, level))
    return checks


def _told(check: Check, items: Sequence[Answered], level: float) -> Check:
    """The check, undecided where a loss of its margin could not be seen, or need not have been."""
    most = 1 / (1 - max(item.chance for item in items))
    return with_enough(_with_something_to_lose(check), most, level, "documents")


def with_enough(check: Check, most: float, level: float, clusters: str) -> Check:
    """The check, undecided where it passed and a loss of the margin, all of it in a few clusters
    that lose `most` each, could have missed those that were read: their interval shows nothing of
    it."""
    fewest = fewest_that_tell((check.limit or 0) / most, level)
    if check.status != "passed" or check.clusters >= fewest:
        return check
    why = f"; but a loss in a few {clusters} alone could be missed: {fewest} and more would tell"
    return replace(check, status="undecided", text=check.text + why)


def _with_something_to_lose(check: Check) -> Check:
    """The check, undecided where the dense model's own score is so low that losing all of it would
    pass."""
    if check.status != "passed" or check.dense is None or check.dense > (check.limit or 0):
        return check
    why = (
        f"; but the dense model itself scores {check.dense:+.3f} above chance, no more than the "
        "margin: a loss could not be seen"
    )
    return replace(check, status="undecided", text=check.text + why)


def _right_answers(items: Sequence[Answered], limits: TaskLimits, level: float) -> list[Check]:
    """Right answers lost less those won, as a share of all: failed where beyond the margin and not
    by chance, undecided where it may be chance, and where so many could not be lost, or of too few
    items need not have been."""
    if not items:
        return []
    turned = [x.score[0] - x.score[1] for x in items]
    lost_ones, won = turned.count(1.0), turned.count(-1.0)
    p, net = mcnemar(lost_ones, won), (lost_ones - won) / len(items)
    beyond, real = net > limits.lost, p < level
    right, documents = sum(x.score[0] for x in items), len({x.document for x in items})
    fewest = fewest_that_tell(limits.lost, level)
    enough = len(items) >= fewest and documents >= limits.fewest_documents
    told = enough and right > limits.lost * len(items)
    status: Status = (
        "failed" if beyond and real else "undecided" if beyond or not told else "passed"
    )
    text = (
        f"right answers: {lost_ones} lost and {won} won of {len(items)} (exact McNemar p = {p:.3g})"
    )
    if beyond:
        text += f", beyond the margin of {limits.lost:g} of all"
        text += "" if real else ": it may be chance; more items would tell"
    elif not enough:
        text += (
            f"; {fewest} items and more, of {limits.fewest_documents} documents, would tell "
            f"{limits.lost:g} of all"
        )
    elif not told:
        text += (
            f"; the dense model has {right:g} right, no more than the margin: none could be lost"
        )
    elif real:
        text += ": a real loss, within the margin"
    return [
        Check(
            name="right-answers",
            status=status,
            text=text,
            required=False,
            difference=net,
            limit=limits.lost,
            p_value=p,
            items=len(items),
            clusters=documents,
        )
    ]
