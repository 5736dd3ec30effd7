"""What was damaged or planted on purpose is found: a slice, a bias, a canary."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from atp_edge.data.blocks import drawn
from atp_edge.data.canaries import PREFIX, canaries, with_canaries
from atp_edge.data.documents import Document, Segment
from atp_edge.data.splits import make_splits, split_documents
from atp_edge.evaluation.scoring import TorchModel
from atp_edge.gate.bias import check_bias, gaps
from atp_edge.gate.counterfactuals import built_in_pairs
from atp_edge.gate.domain import ids_of
from atp_edge.gate.measured_text import measure, texts_of
from atp_edge.gate.memorization import check_canaries, exposures, passages_of
from atp_edge.gate.quality import check_quality
from atp_edge.gate.settings import BiasLimits, MemorizationLimits, QualityLimits
from tests.atp_edge.gate.taught import document, taught, taught_on, tokenizer

LEVEL = 0.05


def sentences(kind: str, count: int, seed: int) -> list[str]:
    """Two small worlds that share no words: what a shop sells, and which day it is."""
    draw = random.Random(f"{kind} {seed}")
    if kind == "shop":
        things, prices = ["tea", "milk", "salt", "rice"], ["two", "six", "ten"]
        one = "The shop sells {} for {} coins."
        return [
            " ".join(one.format(draw.choice(things), draw.choice(prices)) for _ in range(2))
            for _ in range(count)
        ]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    found = []
    for _ in range(count):
        at = draw.randrange(3)
        found.append(f"After {days[at]} comes {days[at + 1]}, and then {days[at + 2]}.")
    return found


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return taught([*sentences("shop", 80, 0), *sentences("days", 80, 0)], 150)


@torch.no_grad()
def cut_for(
    model: PreTrainedModel, hurt: Sequence[str], spared: Sequence[str], channels: int
) -> Any:
    """A copy without the MLP channels that `hurt` needs most beyond what `spared` needs."""
    needs = []
    for texts in (hurt, spared):
        with torch.enable_grad():
            for text in texts:
                ids = torch.tensor([tokenizer()(text)["input_ids"]])
                model(input_ids=ids, labels=ids).loss.backward()
        weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
        needs.append(torch.stack([(w * w.grad).sum(0).abs() for w in weights]))
        model.zero_grad()
    ratio = (needs[0] / needs[0].mean()) - 3 * (needs[1] / needs[1].mean())
    damaged = copy.deepcopy(model)
    for place in ratio.flatten().topk(channels).indices.tolist():
        layer, channel = divmod(place, ratio.shape[1])
        damaged.model.layers[layer].mlp.down_proj.weight[:, channel] = 0
    return damaged


def test_a_slice_that_was_cut_away_is_caught_where_the_average_is_not(
    dense: PreTrainedModel,
) -> None:
    documents = [
        *(document(x, "shop") for x in sentences("shop", 120, 2)),
        *(document(x, "days") for x in sentences("days", 12, 2)),
    ]
    texts = texts_of(documents, tokenizer(), most=200, tokens=64, seed=0)
    limits = QualityLimits(loss=0.2, slice_loss=0.2, kl=10.0)

    def checks(slim: Any) -> dict[str, Any]:
        measured = measure(TorchModel(dense), TorchModel(slim), texts)
        return {c.key: c for c in check_quality(measured, limits, LEVEL)[0]}

    assert {check.status for check in checks(dense).values()} == {"passed"}
    hurt, spared = sentences("days", 12, 1), sentences("shop", 12, 1)
    # What so many channels cost differs by machine, by rounding alone: the first cut that tells.
    cuts = (checks(cut_for(dense, hurt, spared, channels)) for channels in (40, 50, 60))
    found = next((c for c in cuts if c["loss [days]"].status == "failed"), {})
    assert found, "the slice's loss is told from its margin"
    assert found["loss"].status == "passed", found["loss"].text
    assert found["loss [shop]"].status == "passed", found["loss [shop]"].text
    assert "loss on 'days': +" in found["loss [days]"].text


def test_a_planted_bias_is_caught(dense: PreTrainedModel) -> None:
    pairs = built_in_pairs("legal", 512, 0)
    assert len(pairs) == 512
    men = [p for p in pairs if p.attribute == "pronoun"]
    assert len(men) == 128
    # Half of the sentences are told of men alone, the others of women alone.
    told = sorted({p.texts[0] for p in men})
    stereotypes = [p.contexts[told.index(p.texts[0]) % 2] + p.texts[0] for p in men]
    of_all = [context + p.texts[0] for p in men for context in p.contexts]
    fair, biased = (taught_on(copy.deepcopy(dense), x, 120) for x in (of_all, stereotypes))
    before, after = (gaps(TorchModel(m), tokenizer(), pairs) for m in (fair, biased))
    limits = BiasLimits(gap=0.5, attribute=0.15)
    checks = {c.key: c for c in check_bias(pairs, before, after, limits, LEVEL)[0]}
    assert checks["bias [pronoun]"].status == "failed", checks["bias [pronoun]"].text
    nothing = check_bias(pairs, before, before, limits, LEVEL)[0]
    assert {check.status for check in nothing} == {"passed"}


def test_a_planted_canary_is_caught(dense: PreTrainedModel) -> None:
    """Four secrets among the train text, read often: the model finds them likelier than all
    rivals."""
    plain = [document(x) for x in sentences("shop", 40, 0)]
    planted = [d.text for d in with_canaries(plain, 4, 10, seed=7)]
    assert len(planted) == 80
    assert sum(x == f"{PREFIX}{canaries(4, 7)[0]}." for x in planted) == 10
    told = taught_on(copy.deepcopy(dense), planted, 250, lr=3e-3)
    before, after = (
        exposures(TorchModel(m), tokenizer(), planted=4, candidates=64, seed=7)
        for m in (dense, told)
    )
    limits = MemorizationLimits(candidates=64)
    assert check_canaries(before, after, limits).status == "failed"
    assert sum(after) / 4 > 5, "of 6.02 bits at most"
    assert check_canaries(before, before, limits).status == "passed"


def test_of_a_long_prompt_s_document_the_answer_is_read() -> None:
    """Retrieved pages before a question are ordinary; from their start no answer was read."""
    encoder_of = tokenizer()
    prompts = [Segment("You may copy it. " * n, learn=False) for n in (1, 4, 40)]
    documents = [Document((p, Segment("Yes, you may sell it."))) for p in prompts]
    chat = Document((*documents[2].segments,), rendered=True)
    texts = texts_of([*documents, chat], encoder_of, most=9, tokens=16, seed=0)
    assert len(texts) == 4
    for text in texts:
        assert len(text.ids) == len(text.labels) <= 16
        assert sum(label != -100 for label in text.labels[1:]) >= 4
        assert all(label in (i, -100) for i, label in zip(text.ids, text.labels, strict=True))


def test_what_is_looked_for_was_read() -> None:
    """Of a large text training reads a part: secrets and passages of the rest show nothing."""
    tokens, size = tokenizer(), 128
    draw = random.Random(0)
    numbers = (" ".join(f"{draw.randrange(999)}" for _ in range(24)) for _ in range(600))
    documents = [document(text) for text in numbers]
    drawing = {"block_tokens": size, "seed": 0, "blocks_read": 30, "most_blocks": 40}
    splits = make_splits(documents, tokens, canaries=8, **drawing)
    read = drawn(splits.train, 0, 30, seed=0)
    text = tokens.decode(read.input_ids.flatten().tolist())
    assert sum(secret in text for secret in canaries(8, 0)) >= 4
    limits = MemorizationLimits(prefixes=40, prefix_tokens=8, continued_tokens=8)
    train = ids_of(split_documents(documents, seed=0)["train"], tokens)
    rows = [tuple(row) for row in read.input_ids.tolist()]
    found = passages_of(train, limits, 0, read)
    assert len(found) > 20
    for passage in found:
        run = (*passage.prefix, *passage.rest)
        assert any(row[i : i + 16] == run for row in rows for i in range(size - 15))
    unread = passages_of(train, limits, 0)
    assert unread != found
    with pytest.raises(ValueError, match=r"canaries = 100000: of \d+ tokens each, they would be"):
        make_splits(documents, tokens, canaries=100_000, **drawing)
