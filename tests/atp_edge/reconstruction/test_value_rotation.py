"""A basis of the values: the same model, of which fewer dimensions do more."""

from __future__ import annotations

import copy

import pytest
import torch

from atp_edge.data.blocks import Blocks
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import plan_of
from atp_edge.model.structures import by_structure
from atp_edge.reconstruction.value_rotation import rebase_values
from tests.tiny import IDS, PAIR_FAMILIES, logits, tiny_model

BLOCKS = Blocks(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_the_model_computes_the_same_and_its_pairs_keep_more(family: str) -> None:
    dense = tiny_model(family, head_dim=32)
    turned = copy.deepcopy(dense)
    rebase_values(turned, BLOCKS)
    torch.testing.assert_close(logits(turned), logits(dense), atol=5e-5, rtol=0)
    # The half of every layer's pairs whose values write most, in the new basis.
    shape = model_shape(dense.config)
    kept = [tuple(range(40))] * 6
    for i, layer in enumerate(turned.model.layers):
        norms = by_structure(layer.self_attn.o_proj.weight, 1, 16, "head-dims").norm(dim=(1, 2))
        kept[2 * i] = tuple(norms.topk(8).indices.tolist())
    plan = plan_of(shape, kept, "head-dims")
    error, before = (
        float((logits(narrow_model(model, plan)) - logits(dense)).square().mean())
        for model in (turned, dense)
    )
    assert error < before / 2


def test_the_same_text_gives_the_same_bits() -> None:
    one, two = tiny_model("qwen2"), tiny_model("qwen2")
    rebase_values(one, BLOCKS)
    rebase_values(two, BLOCKS)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name


def test_values_without_any_spread_or_use_leave_finite_weights() -> None:
    model = tiny_model("llama")
    unused, silent, both = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        for weight in (unused.o_proj, both.o_proj, silent.v_proj, both.v_proj):
            weight.weight.zero_()
        expected = logits(model)
        rebase_values(model, BLOCKS)
    torch.testing.assert_close(logits(model), expected, atol=5e-5, rtol=0)
