"""Both models on the domain's tasks: who answers what, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atp_edge.evaluation.items import ChoiceTask, Task, TextTask
from atp_edge.evaluation.scoring import LanguageModel
from atp_edge.evaluation.task_scores import (
    answers,
    choice_scores,
    rouge,
    rouge_by_chance,
    softmax,
)
from atp_edge.gate.measured_text import BATCH_TOKENS
from atp_edge.gate.statistics import Floats


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One item, dense and slim. score: right or not, or ROUGE-L; chance: what guessing earns.

    said: the option taken, or the text written. confidence: in the option taken.
    """

    task: str
    generated: bool
    document: int
    slice: str
    prompt: str
    expected: str
    chance: float
    score: tuple[float, float]
    said: tuple[str, str]
    confidence: tuple[float, float] = (0.0, 0.0)

    @property
    def lost(self) -> float:
        """What the slim model scores less, chance-corrected."""
        return (self.score[0] - self.score[1]) / (1 - self.chance)


def answer(
    dense: LanguageModel, slim: LanguageModel, tokenizer: Any, tasks: Sequence[Task]
) -> list[Answered]:
    """Every item of every task by both models."""
    choices = [task for task in tasks if isinstance(task, ChoiceTask)]
    scores = [choice_scores(m, tokenizer, choices, BATCH_TOKENS) for m in (dense, slim)]
    found: list[Answered] = []
    for task, *of_task in zip(choices, *scores, strict=True):
        found += _chosen(task, of_task)
    for task in tasks:
        if isinstance(task, TextTask):
            found += _written(dense, slim, tokenizer, task)
    return found


def _chosen(task: ChoiceTask, scored: Sequence[Sequence[Floats]]) -> list[Answered]:
    """scored: of the options of every item, by `dense` and by `slim`."""
    found = []
    for item, *scores in zip(task.items, *scored, strict=True):
        probabilities = [softmax(s) for s in scores]
        # No number is no answer, and not the first option, which may be the right one.
        taken = [int(p.argmax()) if np.isfinite(p).all() else None for p in probabilities]
        right = item.options[item.answer]
        # Where one text is scored after several prompts, the prompts are what differs.
        by_prompt = len({o.prompt for o in item.options}) > 1
        shown = [o.prompt if by_prompt else o.text for o in item.options]
        said = [shown[t] if t is not None else "" for t in taken]
        found.append(
            Answered(
                task=task.name,
                generated=False,
                document=item.document,
                slice=item.slice,
                prompt=right.text if by_prompt else right.prompt,
                expected=shown[item.answer],
                chance=1 / len(item.options),
                score=(float(taken[0] == item.answer), float(taken[1] == item.answer)),
                said=(said[0], said[1]),
                confidence=(float(probabilities[0].max()), float(probabilities[1].max())),
            )
        )
    return found


def _written(
    dense: LanguageModel, slim: LanguageModel, tokenizer: Any, task: TextTask
) -> list[Answered]:
    references = [item.reference for item in task.items]
    texts = [answers(m, tokenizer, task) for m in (dense, slim)]
    scores: list[Floats] = [rouge(references, said)["rougeL"] for said in texts]
    chance = min(rouge_by_chance(references), 0.99) if len(references) > 1 else 0.0
    return [
        Answered(
            task=task.name,
            generated=True,
            document=item.document,
            slice=item.slice,
            prompt=item.prompt,
            expected=item.reference,
            chance=chance,
            score=(float(scores[0][i]), float(scores[1][i])),
            said=(texts[0][i], texts[1][i]),
        )
        for i, item in enumerate(task.items)
    ]


def corrected(items: Sequence[Answered], which: int) -> float:
    """Mean score above chance; 0 is guessing."""
    return float(np.mean([(x.score[which] - x.chance) / (1 - x.chance) for x in items]))
