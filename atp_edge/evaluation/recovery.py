"""What a slim model keeps of a dense one, task by task, with its interval.

Resampled over the items that both models answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from atp_edge.evaluation.bootstrap import middle, resampled
from atp_edge.evaluation.task_scores import TaskScore


@dataclass(frozen=True, kw_only=True)
class TaskRecovery:
    """Slim over dense on one task.

    chance_corrected: the same above chance; None where the dense model is not above it.
    """

    dense: float
    slim: float
    ratio: float
    chance_corrected: float | None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a slim model keeps of the dense one; perplexity (dense over slim) is apart.

    average: mean ratio over the tasks, as the paper takes it; interval: its 95 % interval, by
    resampling the items that both models answered.
    """

    tasks: Mapping[str, TaskRecovery]
    average: float
    interval: tuple[float, float]
    average_chance_corrected: float | None
    perplexity: float | None


def recovery(
    dense: Mapping[str, TaskScore],
    slim: Mapping[str, TaskScore],
    *,
    perplexities: tuple[float, float] | None = None,
) -> Recovery:
    """Compare two models on the same tasks; perplexities: (dense, slim).

    Raises ValueError when the tasks differ or the dense model scores zero on one.
    """
    if {n: len(s.per_item) for n, s in dense.items()} != {
        n: len(s.per_item) for n, s in slim.items()
    }:
        raise ValueError(
            f"dense was scored on {', '.join(dense)} and slim on {', '.join(slim)}; expected the "
            "same tasks with the same items: evaluate both on one list of tasks"
        )
    zero = [name for name, score in dense.items() if score.value <= 0]
    if zero or not dense:
        raise ValueError(
            f"the dense model scores 0 on {', '.join(zero) or 'no task at all'}: "
            "no recovery can be told; leave the task out or give it more items"
        )
    tasks = {name: _task_recovery(dense[name], slim[name]) for name in dense}
    corrected = [t.chance_corrected for t in tasks.values() if t.chance_corrected is not None]
    return Recovery(
        tasks=tasks,
        average=float(np.mean([t.ratio for t in tasks.values()])),
        interval=_recovery_interval(dense, slim),
        average_chance_corrected=float(np.mean(corrected)) if corrected else None,
        perplexity=perplexities[0] / perplexities[1] if perplexities else None,
    )


def _task_recovery(dense: TaskScore, slim: TaskScore) -> TaskRecovery:
    above = dense.chance_corrected
    return TaskRecovery(
        dense=dense.value,
        slim=slim.value,
        ratio=slim.value / dense.value,
        chance_corrected=slim.chance_corrected / above if above > 0 else None,
    )


def _recovery_interval(
    dense: Mapping[str, TaskScore], slim: Mapping[str, TaskScore]
) -> tuple[float, float]:
    ratios = []
    for i, name in enumerate(dense):
        above, below = np.array(slim[name].per_item), np.array(dense[name].per_item)
        drawn = resampled(len(below), seed=i)
        means = below[drawn].mean(axis=1)
        # A resample without one right answer of the dense model says nothing: left out.
        ratios.append(above[drawn].mean(axis=1) / np.where(means > 0, means, np.nan))
    whole = np.mean(ratios, axis=0)
    return middle(whole[np.isfinite(whole)])
