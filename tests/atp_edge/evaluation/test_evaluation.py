"""Scores of models whose answers are known, and what a slim model recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atp_edge.evaluation.bootstrap import bootstrap
from atp_edge.evaluation.items import ChoiceItem, ChoiceTask, Option, TextItem, TextTask
from atp_edge.evaluation.recovery import recovery
from atp_edge.evaluation.scoring import TorchModel, likelihoods
from atp_edge.evaluation.task_scores import TaskScore, calibration_error, evaluate
from tests.tiny import tiny_model


class Letters:
    """A tokenizer of one token a character; the end of text is 0."""

    eos_token_id = 0

    def __call__(self, text: str | list[str], **_: bool) -> dict[str, list[Any]]:
        if isinstance(text, str):
            return {"input_ids": [ord(c) % 97 for c in text]}
        return {"input_ids": [self(one)["input_ids"] for one in text]}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(chr(97 + i) if i else " " for i in row) for row in rows]


@dataclass
class Constant:
    """A model that gives every token a fixed logit, and writes a fixed text."""

    row: Tensor
    window: int | None = None

    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        return self.row.expand(len(tokens), last, -1)

    def logits_after(self, prompt: Any, rows: Any) -> list[Tensor]:
        return [self.row.expand(len(row), -1) for row in rows]

    def generate(self, prompts: Any, *, new_tokens: int, end: int) -> list[list[int]]:
        return [[1, 2, 0, 3] for _ in prompts]


def item(right: str, wrong: str) -> ChoiceItem:
    return ChoiceItem(
        options=(Option(prompt="x", text=wrong), Option(prompt="x", text=right)), answer=1
    )


def test_likelihoods_are_those_of_the_model_row_by_row_whatever_the_batch() -> None:
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 97, (n,), generator=draw).tolist() for n in (5, 9, 13, 7)]
    cuts = [3, 2, 6, 1]
    pairs = [(row[:cut], row[cut:]) for row, cut in zip(rows, cuts, strict=True)]
    found = likelihoods(TorchModel(model), pairs, batch_tokens=30)
    for row, cut, one in zip(rows, cuts, found, strict=True):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[i - 1, row[i]]) for i in range(cut, len(row)))
        assert one.log == pytest.approx(expected, abs=1e-4)
        assert one.tokens == len(row) - cut
    with pytest.raises(ValueError, match="empty"):
        likelihoods(TorchModel(model), [([1], [])], batch_tokens=8)


def test_greedy_generation_stops_before_the_end_and_ignores_the_padding() -> None:
    model = tiny_model("llama")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    together = TorchModel(model).generate(prompts, new_tokens=6, end=0)
    alone = [TorchModel(model).generate([p], new_tokens=6, end=0)[0] for p in prompts]
    assert together == alone
    end = together[0][2]
    cut = TorchModel(model).generate(prompts[:1], new_tokens=6, end=end)[0]
    assert cut == together[0][: together[0].index(end)]


def test_choices_are_won_by_likelihood_and_calibration_takes_the_prior_away() -> None:
    row = torch.zeros(97)
    row[ord("b") % 97] = 2.0
    items = (item("b", "c"), item("b", "c"), item("c", "b"), item("b", "c"))
    likely = ChoiceTask(name="likely", items=items, scoring="sum")
    prior = ChoiceTask(name="prior", items=items, scoring="calibrated")
    found = evaluate(Constant(row), Letters(), [likely, prior])
    assert found["likely"].per_item == (1.0, 1.0, 0.0, 1.0)
    assert found["likely"].chance_corrected == pytest.approx(0.5)
    p = math.e**2 / (1 + math.e**2)
    assert found["likely"].extra["calibration_error"] == pytest.approx(p - 0.75)
    brier = (3 * 2 * (1 - p) ** 2 + 2 * p**2) / 4
    assert found["likely"].extra["brier"] == pytest.approx(brier)
    # The model knows nothing of the prompt: without the prior every option is worth the same.
    assert found["prior"].extra["brier"] == pytest.approx(0.5)


def test_generation_is_scored_by_rouge_against_chance() -> None:
    task = TextTask(
        name="write",
        items=(TextItem(prompt="x", reference="bc d"), TextItem(prompt="x", reference="q r")),
    )
    score = evaluate(Constant(torch.zeros(97)), Letters(), [task])["write"]
    assert score.per_item == (1.0, 0.0)
    assert score.chance == 0.0
    assert score.extra == {"f1": 0.5, "rouge_2": 0.5}


def test_calibration_error_of_known_bins() -> None:
    confidence, right = np.array([0.95, 0.95, 0.5, 0.5]), np.array([1.0, 0.0, 1.0, 0.0])
    assert calibration_error(confidence, right) == pytest.approx(0.5 * 0.45)


def test_the_bootstrap_covers_the_mean_and_narrows_with_items() -> None:
    few, many = np.arange(10) % 2 * 1.0, np.arange(1000) % 2 * 1.0
    (a, b), (c, d) = bootstrap(few), bootstrap(many)
    assert a < 0.5 < b
    assert c < 0.5 < d
    assert d - c == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(1000), rel=0.15)
    assert d - c < b - a


def score(value: list[float], chance: float = 0.25, name: str = "t") -> TaskScore:
    mean = float(np.mean(value))
    return TaskScore(
        name=name, value=mean, interval=(0, 1), chance=chance, per_item=tuple(value), extra={}
    )


def test_recovery_is_slim_over_dense_and_apart_from_perplexity() -> None:
    dense = {"a": score([1, 1, 1, 0]), "b": score([0.2, 0.4], 0.1)}
    slim = {"a": score([1, 1, 0, 0]), "b": score([0.2, 0.4], 0.1)}
    found = recovery(dense, slim, perplexities=(9.0, 12.0))
    assert found.tasks["a"].ratio == pytest.approx(2 / 3)
    assert found.tasks["a"].chance_corrected == pytest.approx(0.25 / 0.5)
    assert found.average == pytest.approx((2 / 3 + 1) / 2)
    assert found.average_chance_corrected == pytest.approx(0.75)
    assert found.interval[0] < found.average < found.interval[1] <= 1.0
    assert found.perplexity == pytest.approx(0.75)


def test_recovery_refuses_other_tasks_and_a_dense_model_that_knows_nothing() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        recovery({"a": score([1.0])}, {"b": score([1.0])})
    with pytest.raises(ValueError, match="scores 0 on a"):
        recovery({"a": score([0.0])}, {"a": score([1.0])})
    guessing = recovery({"a": score([0.2])}, {"a": score([0.2])})
    assert guessing.average_chance_corrected is None
