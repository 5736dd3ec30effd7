"""Text that is longer than its model reads is refused, cut or left out with a word, wherever it
enters: of longrope and dynamic RoPE the angles follow the longest text of a batch, so that what is
said of a text would depend on what is read beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.data.encoding import Encoder
from atp_edge.evaluation.fitting import Fits, fitting
from atp_edge.evaluation.items import (
    NEW_TOKENS,
    ChoiceItem,
    ChoiceTask,
    Option,
    Task,
    TextItem,
    TextTask,
)
from atp_edge.evaluation.scoring import TorchModel, likelihoods
from atp_edge.evaluation.task_scores import choice_scores, evaluate
from atp_edge.evaluation.text_loss import streamed_text_loss, text_loss
from atp_edge.model.checkpoint import save_narrow
from tests.atp_edge.evaluation.test_evaluation import Letters
from tests.tiny import tiny_model

LONGEST = 48
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
KINDS = ("longrope", "dynamic")


@cache
def made(kind: str) -> PreTrainedModel:
    if kind == "longrope":
        return tiny_model("phi4-mini", original_max_position_embeddings=LONGEST)
    return tiny_model("llama", max_position_embeddings=LONGEST, rope_parameters=DYNAMIC)


def text(length: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (length,), generator=draw).tolist()


SHORT = (text(20), text(5, 1))


def scored(model: Any, pairs: Sequence[Any]) -> list[float]:
    return [one.log for one in likelihoods(TorchModel(model), pairs, batch_tokens=10_000)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_scores_alone_as_beside_the_longest_that_is_read(kind: str) -> None:
    model = made(kind)
    whole = (text(LONGEST - 4, 2), text(5, 3))  # The last token is predicted, not read.
    alone = scored(model, [SHORT])
    assert scored(model, [SHORT, whole])[0] == pytest.approx(alone[0], abs=1e-4)
    with torch.no_grad():  # What is refused would have changed it.
        rows = torch.tensor([[*SHORT[0], *SHORT[1]] + [0] * LONGEST])
        beside = model(input_ids=rows).logits[0, 19:24].log_softmax(-1)
    wanted = torch.tensor(SHORT[1])[:, None]
    assert abs(float(beside.gather(-1, wanted).sum()) - alone[0]) > 0.1


def choice(prompt: str, *, null: str = "") -> ChoiceTask:
    options = tuple(Option(prompt=prompt, text=t, null=null) for t in ("ab", "cd"))
    item = ChoiceItem(options=options, answer=0)
    fits = ChoiceItem(options=tuple(Option(prompt="x", text=t) for t in ("ab", "cd")), answer=0)
    return ChoiceTask(name="choice", items=(fits, item), scoring="calibrated")


def written(prompt: str) -> TextTask:
    items = (TextItem(prompt="x", reference="a b"), TextItem(prompt=prompt, reference="a b"))
    return TextTask(name="write", items=items)


def asked(*tasks: Task) -> Callable[[Any, Path], Any]:
    return lambda model, _: evaluate(model, Letters(), tasks)


def blocks(tokens: int) -> Blocks:
    ids = torch.tensor([text(tokens)])
    return Blocks(input_ids=ids, labels=ids)


def measured(model: Any, _: Path) -> Any:
    from atp_edge.gate.measured_text import Text, measure

    ids = [tuple(text(n)) for n in (20, LONGEST + 1)]
    both = TorchModel(model), TorchModel(model)
    return measure(*both, [Text(ids=row, labels=row, slice="all") for row in ids])


def biased(model: Any, _: Path) -> Any:
    from atp_edge.gate.bias import gaps
    from atp_edge.gate.counterfactuals import Pair

    contexts = ("He", "She" * LONGEST)
    pair = Pair(attribute="x", subject=0, contexts=contexts, texts=(" is", " is"))
    return gaps(TorchModel(model), Letters(), [pair])


def continued(model: Any, _: Path) -> Any:
    from atp_edge.gate.memorization import Passage, continuations

    passages = [Passage(prefix=tuple(text(n)), rest=()) for n in (4, LONGEST)]
    return continuations(TorchModel(model), passages, new_tokens=2, end=0)


def exposed(model: Any, _: Path) -> Any:
    from atp_edge.gate.memorization import exposures

    return exposures(TorchModel(model), Letters(), planted=1, candidates=2, seed=0)


def proven_as_gguf(model: Any, folder: Path) -> Any:
    from atp_export.gguf.proof import prove_gguf

    ids = blocks(LONGEST + 1).input_ids
    file = folder / "no file is read"
    return prove_gguf(saved(model, folder), file, "f32", None, prompts=(), blocks=ids, node=None)


def calibrated(model: Any, folder: Path) -> Any:
    from atp_export.quantization.calibrate import input_grams

    return input_grams(saved(model, folder), blocks(LONGEST + 1).input_ids)


def timed(model: Any, folder: Path) -> Any:
    from atp_bench.training import make_bench

    where = str(saved(model, folder))
    return make_bench(where, kept=0.6, tokens=LONGEST + 1, rank=4, device="cpu")


def saved(model: Any, folder: Path) -> Path:
    save_narrow(model, None, folder / "slim")
    return folder / "slim"


LONG = "y" * LONGEST
ENTRIES: dict[str, Callable[[Any, Path], Any]] = {
    "a pair": lambda model, _: scored(model, [SHORT, (text(LONGEST - 3), text(5))]),
    "pairs of one context": lambda model, _: scored(
        model, [SHORT, (text(40), text(5)), (text(40), text(10))]
    ),
    "a batch": lambda model, _: TorchModel(model).logits(
        torch.ones(2, LONGEST + 1, dtype=torch.long), torch.ones(2, LONGEST + 1), last=1
    ),
    "after a prompt": lambda model, _: TorchModel(model).logits_after(text(40), [[1], text(9)]),
    "a prompt": lambda model, _: TorchModel(model).generate([[1], text(40)], new_tokens=10, end=0),
    "choices": lambda model, _: choice_scores(TorchModel(model), Letters(), [choice(LONG)], 2048),
    "an item": asked(choice(LONG)),
    "an item without what it tells": asked(choice("x", null=LONG)),
    "an item that is answered": asked(written(LONG)),
    "text": lambda model, _: text_loss(model, blocks(LONGEST + 1)),
    "text, layer by layer": lambda model, folder: streamed_text_loss(
        saved(model, folder), blocks(LONGEST + 1)
    ),
    "documents of the gate": measured,
    "pairs of the gate": biased,
    "passages of the gate": continued,
    "canaries of the gate": exposed,
    "a GGUF file's proof": proven_as_gguf,
    "calibration": calibrated,
    "timed steps": timed,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_text_beyond_it_is_refused_wherever_it_enters(
    kind: str, entry: str, tmp_path: Path
) -> None:
    if entry == "a GGUF file's proof":
        pytest.importorskip("gguf")
    item = r"task '\w+', item 2: longer than the 48 tokens that the model reads; shorten it"
    said = item if entry.startswith("an item") else "tokens, and the model reads 48; "
    with pytest.raises(ValueError, match=said):
        ENTRIES[entry](made(kind), tmp_path)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_scoring_writing_and_what_fits_have_one_limit(more: int) -> None:
    """The last token of all is predicted, not read."""
    model, fits = TorchModel(made("dynamic")), Fits(Encoder(Letters()), LONGEST)
    whole = LONGEST + 1 + more - len(fits.encoder.context(""))
    options = tuple(Option(prompt="y" * (whole - 2), text=text) for text in ("ab", "cd"))
    chosen = ChoiceItem(options=options, answer=0)
    wrote = TextItem(prompt="y" * (whole - NEW_TOKENS), reference="a b")
    tasks = (
        ChoiceTask(name="choice", items=(chosen,), scoring="sum"),
        TextTask(name="write", items=(wrote,)),
    )
    assert [fits.item(chosen), fits.item(wrote)] == [more <= 0] * 2
    pair, prompt = (
        fits.encoder.continued(options[0].prompt, "ab"),
        fits.encoder.context(wrote.prompt),
    )
    asks: list[Callable[[], Any]] = [
        lambda: scored(model.model, [pair]),
        lambda: model.generate([prompt], new_tokens=NEW_TOKENS, end=0),
        *(lambda task=task: evaluate(model, Letters(), [task]) for task in tasks),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match="48") if more > 0 else nullcontext():
            ask()


@pytest.mark.parametrize("kind", KINDS)
def test_items_that_fit_score_as_if_the_others_were_not_there(kind: str) -> None:
    tasks, said = fitting(
        [choice(LONG), written(LONG), written(LONG * 2)], Fits(Encoder(Letters()), LONGEST)
    )
    assert said == ["left out, longer than the 48 tokens that are read: 3 items"]
    assert [len(task.items) for task in tasks] == [1, 1, 1]
    assert evaluate(made(kind), Letters(), tasks)["choice"].per_item
    every, nothing = fitting(tasks, Fits(Encoder(Letters()), LONGEST))
    assert (every, nothing) == (tasks, [])
    assert not fitting([written(LONG)], Fits(Encoder(Letters()), 2))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_lm_evals_prompts_lose_their_start_and_that_is_said(kind: str) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from atp_bench.lm_eval_adapter import HarnessModel

    harness = HarnessModel(TorchModel(made(kind)), Letters(), window=LONGEST)
    assert not harness.notes
    pairs = [SHORT, (text(99), text(5, 1)), (text(99), text(4, 2))]
    found = harness._loglikelihood_tokens([(None, *pair) for pair in pairs])
    assert [log for log, _ in found] == pytest.approx(
        [scored(made(kind), [(c[-(LONGEST + 1 - len(new)) :], new)])[0] for c, new in pairs],
        abs=1e-4,
    )
    assert harness.notes == [
        "lm-eval prompts longer than the 48 tokens that are read, start cut off: 1"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_end_where_the_model_reads_no_further(kind: str) -> None:
    from atp_edge.pipeline.samples import greedy

    prompt = text(LONGEST - 6)
    new = greedy(made(kind), prompt).tolist()
    assert len(new) == 6
    row = list(prompt)
    for token in new:
        with torch.no_grad():
            assert int(made(kind)(torch.tensor([row])).logits[0, -1].argmax()) == token
        row.append(token)
