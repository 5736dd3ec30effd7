"""A context that several continuations follow is read once, and they score as when it is read for
each: by the PyTorch model, and by the ONNX file of every flavour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_bench.onnx_model import OnnxModel
from atp_export.export import export_onnx
from atp_export.runtime import Session
from torch import Tensor

from atp_edge.config import Flavour
from atp_edge.evaluation.items import ChoiceItem, ChoiceTask, Option
from atp_edge.evaluation.scoring import LanguageModel, TorchModel, likelihoods
from atp_edge.evaluation.task_scores import choice_scores
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model
from tests.atp_edge.evaluation.test_evaluation import Letters
from tests.tiny import per_layer_plan, tiny_model

Tokens = tuple[int, ...]


@dataclass
class Counted:
    """A model, and the tokens that it read."""

    model: LanguageModel
    read: list[int] = field(default_factory=list)

    @property
    def window(self) -> int | None:
        return self.model.window

    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        self.read.append(int(mask.sum()))
        return self.model.logits(tokens, mask, last=last)

    def logits_after(self, prompt: Any, rows: Any) -> list[Tensor]:
        self.read.append(len(prompt) + sum(map(len, rows)))
        return self.model.logits_after(prompt, rows)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)


def torch_model(family: str, _: Path) -> LanguageModel:
    return TorchModel(tiny_model(family))


def narrow_torch(_: str, __: Path) -> LanguageModel:
    model = tiny_model("llama")
    return TorchModel(narrow_model(model, per_layer_plan(model)))


def onnx_model(flavour: Flavour, folder: Path) -> LanguageModel:
    save_narrow(tiny_model("llama"), None, folder / "slim")
    export_onnx(folder / "slim", folder / "onnx", flavour=flavour)
    return OnnxModel(Session(folder / "onnx", threads=1))


MODELS: list[tuple[Callable[[Any, Path], LanguageModel], str]] = [
    (torch_model, "llama"),
    (torch_model, "gemma2"),
    (torch_model, "ministral"),
    (narrow_torch, "per layer"),
    (onnx_model, "ort"),
    (onnx_model, "standard"),
    (onnx_model, "portable"),
]


def text(length: int, seed: int) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 97, (length,), generator=draw).tolist())


def pairs() -> list[tuple[Tokens, Tokens]]:
    """Two contexts with several continuations, of lengths that differ, one token among them; one
    that is alone, and a short one."""
    long, other, alone, short = text(40, 0), text(33, 1), text(50, 2), text(3, 3)
    lengths = {long: (1, 9, 4), other: (6, 2), alone: (5,), short: (7, 3)}
    return [(c, text(n, 10 + n)) for c, many in lengths.items() for n in many]


@pytest.mark.parametrize(("make", "name"), MODELS, ids=[name for _, name in MODELS])
def test_continuations_score_as_when_every_one_has_its_context_read_for_it(
    make: Callable[[Any, Path], LanguageModel], name: str, tmp_path: Path
) -> None:
    model = make(name, tmp_path)
    together = Counted(model)
    found = likelihoods(together, pairs(), batch_tokens=256)
    apart = Counted(model)
    expected = [likelihoods(apart, [pair], batch_tokens=256)[0] for pair in pairs()]
    assert [x.log for x in found] == pytest.approx([x.log for x in expected], abs=1e-4)
    assert [(x.tokens, x.greedy) for x in found] == [(x.tokens, x.greedy) for x in expected]
    # But for their last tokens, 40 tokens are read once in place of three times, 33 of twice.
    assert sum(together.read) == sum(apart.read) - 2 * 39 - 32
    # Room for one row alone: nothing is shared, for the past would take its memory once a row.
    assert [x.log for x in likelihoods(model, pairs(), batch_tokens=8)] == pytest.approx(
        [x.log for x in expected], abs=1e-4
    )


def test_tasks_that_ask_after_one_prompt_read_it_once() -> None:
    prompt = "the licensee may copy and distribute the work, if"
    options = tuple(Option(prompt=prompt, text=t) for t in ("so said", "not", "it pays"))
    tasks = [
        ChoiceTask(name="sum", scoring="sum", items=(ChoiceItem(options=options, answer=0),)),
        ChoiceTask(
            name="prior", scoring="calibrated", items=(ChoiceItem(options=options[1:], answer=0),)
        ),
    ]
    model = Counted(TorchModel(tiny_model("llama")))
    both = choice_scores(model, Letters(), tasks, 512)
    read_together = sum(model.read)
    model.read.clear()
    apart = [choice_scores(model, Letters(), [task], 512)[0] for task in tasks]
    for found, expected in zip(both, apart, strict=True):
        assert found[0].tolist() == pytest.approx(expected[0].tolist(), abs=1e-4)
    assert read_together < sum(model.read) - len(prompt)
