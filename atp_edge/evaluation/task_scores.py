"""Scores of a model on the domain's tasks, on text it has not seen.

Figures come with their chance level and a 95 % bootstrap interval over items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.bootstrap import Floats, bootstrap
from atp_edge.evaluation.items import ChoiceItem, ChoiceTask, Option, Task, TextTask
from atp_edge.evaluation.scoring import LanguageModel, language_model, likelihoods
from atp_edge.run.watched import counted

CALIBRATION_BINS = 15

NEW_TOKENS = 20

# Prompts generated for at once: fixed, so that scores do not move with the memory at hand.
_GENERATED_ROWS = 25


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task: its main figure (accuracy, or ROUGE-L), what guessing earns, and the rest.

    per_item: the main figure item by item. extra: for choices `calibration_error` and `brier`, of
    the softmax over the scores that decide; for generation `f1` (of words) and `rouge_2`.
    """

    name: str
    value: float
    interval: tuple[float, float]
    chance: float
    per_item: tuple[float, ...]
    extra: Mapping[str, float]

    @property
    def chance_corrected(self) -> float:
        """0 where guessing is as good, 1 where all is right."""
        return (self.value - self.chance) / (1 - self.chance)


def evaluate(
    model: nn.Module | LanguageModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    batch_tokens: int = 2048,
) -> dict[str, TaskScore]:
    """Scores by task, of a module of torch (under the caller's autocast) or any LanguageModel."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    scored = language_model(model)
    found = {
        task.name: _choose(scored, tokenizer, task, batch_tokens)
        if isinstance(task, ChoiceTask)
        else _write(scored, tokenizer, task)
        for task in tasks
    }
    if isinstance(model, nn.Module):
        model.train(was_training)
    return found


# Multiple choice


def _choose(model: LanguageModel, tokenizer: Any, task: ChoiceTask, batch_tokens: int) -> TaskScore:
    probabilities = [softmax(s) for s in choice_scores(model, tokenizer, task, batch_tokens)]
    right = np.array(
        [float(p.argmax() == i.answer) for p, i in zip(probabilities, task.items, strict=True)]
    )
    return TaskScore(
        name=task.name,
        value=float(right.mean()),
        interval=bootstrap(right),
        chance=task.chance,
        per_item=tuple(right.tolist()),
        extra={
            "calibration_error": calibration_error(
                np.array([p.max() for p in probabilities]), right
            ),
            "brier": _brier(probabilities, task.items),
        },
    )


def choice_scores(
    model: LanguageModel, tokenizer: Any, task: ChoiceTask, batch_tokens: int
) -> list[Floats]:
    """The score of every option, item by item, by the task's scoring."""

    encoder = Encoder(tokenizer)

    def of(prompt: Callable[[Option], str]) -> list[float]:
        pairs = [encoder.continued(prompt(o), o.text) for item in task.items for o in item.options]
        scores = likelihoods(model, pairs, batch_tokens=batch_tokens)
        return [s.log / (s.tokens if task.scoring == "calibrated" else 1) for s in scores]

    flat = np.array(of(lambda option: option.prompt))
    if task.scoring == "calibrated":
        flat -= np.array(of(lambda option: option.null))
    ends = np.cumsum([len(item.options) for item in task.items])[:-1]
    return list(np.split(flat, ends))


def softmax(scores: Floats) -> Floats:
    """Probabilities of the options of one item."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _brier(probabilities: Sequence[Floats], items: Sequence[ChoiceItem]) -> float:
    """Mean over items of the squared distance between probabilities and the truth (0 to 2)."""
    return float(
        np.mean(
            [
                ((p - (np.arange(len(p)) == item.answer)) ** 2).sum()
                for p, item in zip(probabilities, items, strict=True)
            ]
        )
    )


def calibration_error(confidence: Floats, right: Floats) -> float:
    """Expected calibration error over 15 equal bins (Guo et al., arXiv 1706.04599, eq. 3)."""
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean())
        for b in np.unique(bins)
    ]
    return float(sum(gaps))


# Generation


def _write(model: LanguageModel, tokenizer: Any, task: TextTask) -> TaskScore:
    references = [item.reference for item in task.items]
    scores = rouge(references, answers(model, tokenizer, task))
    return TaskScore(
        name=task.name,
        value=float(scores["rougeL"].mean()),
        interval=bootstrap(scores["rougeL"]),
        chance=rouge_by_chance(references),
        per_item=tuple(scores["rougeL"].tolist()),
        extra={"f1": float(scores["rouge1"].mean()), "rouge_2": float(scores["rouge2"].mean())},
    )


def answers(model: LanguageModel, tokenizer: Any, task: TextTask) -> list[str]:
    """What the model writes after every prompt, cut to what is scored."""
    encoder = Encoder(tokenizer)
    prompts = [encoder.context(item.prompt) for item in task.items]
    made: list[list[int]] = []
    for i in counted(range(0, len(prompts), _GENERATED_ROWS), "writing answers"):
        batch = prompts[i : i + _GENERATED_ROWS]
        made += model.generate(batch, new_tokens=NEW_TOKENS, end=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(made)
    return [_cut(text, item.reference) for text, item in zip(texts, task.items, strict=True)]


def rouge_by_chance(references: Sequence[str]) -> float:
    """ROUGE-L of an answer that has nothing to do with its item: the reference of the next one."""
    return float(rouge(references, [*references[1:], *references[:1]])["rougeL"].mean())


def _cut(text: str, reference: str) -> str:
    """The first line, cut to as many words as the reference has: length is not scored."""
    lines = text.strip().splitlines() or [""]
    return " ".join(lines[0].split()[: len(reference.split())])


def rouge(references: Sequence[str], answers: Sequence[str]) -> dict[str, Floats]:
    """F measures of ROUGE-1 (the F1 of words), ROUGE-2 and ROUGE-L, item by item."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(r, a) for r, a in zip(references, answers, strict=True)]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in rows[0]}
