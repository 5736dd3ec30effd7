"""Scores of a model on the domain's tasks, on text it has not seen.

Figures come with their chance level and a 95 % bootstrap interval over items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.bootstrap import Floats, bootstrap
from atp_edge.evaluation.fitting import Fits, check_fitting
from atp_edge.evaluation.items import (
    NEW_TOKENS,
    ChoiceItem,
    ChoiceTask,
    Option,
    Task,
    TextTask,
)
from atp_edge.evaluation.scoring import LanguageModel, batches_of, language_model, likelihoods
from atp_edge.run.watched import counted

CALIBRATION_BINS = 15

# Tokens of what is generated at once, prompts and padding included: fixed, so that scores do not
# move with the memory at hand.
_GENERATED_TOKENS = 2048


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
    """Scores by task, of a module of torch (under the caller's autocast) or any LanguageModel.

    Raises ValueError, before anything is scored, for an item that the model does not read whole
    (`fitting` leaves such out).
    """
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    scored = language_model(model)
    check_fitting(tasks, Fits(Encoder(tokenizer), scored.window))
    choices = [task for task in tasks if isinstance(task, ChoiceTask)]
    scores = choice_scores(scored, tokenizer, choices, batch_tokens)
    chosen = [_choose(task, of) for task, of in zip(choices, scores, strict=True)]
    written = [_write(scored, tokenizer, task) for task in tasks if isinstance(task, TextTask)]
    if isinstance(model, nn.Module):
        model.train(was_training)
    return {score.name: score for score in (*chosen, *written)}


# Multiple choice


def _choose(task: ChoiceTask, scores: Sequence[Floats]) -> TaskScore:
    probabilities = [softmax(s) for s in scores]
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
    model: LanguageModel, tokenizer: Any, tasks: Sequence[ChoiceTask], batch_tokens: int
) -> list[list[Floats]]:
    """The scores of the options of every item of every task, by the task's scoring. Of all tasks
    together, for tasks ask after the same prompts."""
    encoder = Encoder(tokenizer)
    asked = [
        encoder.continued(prompt, option.text)
        for task in tasks
        for item in task.items
        for option in item.options
        for prompt in _prompts(task, option)
    ]
    found = iter(likelihoods(model, asked, batch_tokens=batch_tokens))

    def score(task: ChoiceTask, option: Option) -> float:
        told, *null = (next(found) for _ in _prompts(task, option))
        return told.log / told.tokens - null[0].log / null[0].tokens if null else told.log

    return [
        [np.array([score(task, option) for option in item.options]) for item in task.items]
        for task in tasks
    ]


def _prompts(task: ChoiceTask, option: Option) -> tuple[str, ...]:
    """What an option's text is scored after."""
    calibrated = task.scoring == "calibrated"
    return (option.prompt, option.null) if calibrated else (option.prompt,)


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
    # By length: a batch is padded to its longest prompt.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = batches_of(order, lambda i: len(prompts[i]) + NEW_TOKENS, _GENERATED_TOKENS)
    made: dict[int, list[int]] = {}
    for batch in counted(list(batches), "writing answers"):
        new = model.generate(
            [prompts[i] for i in batch], new_tokens=NEW_TOKENS, end=tokenizer.eos_token_id
        )
        made |= dict(zip(batch, new, strict=True))
    texts = tokenizer.batch_decode([made[i] for i in range(len(prompts))])
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
