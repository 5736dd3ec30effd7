"""Invariants 1 and 5: masked == narrow in fp32, and an all-kept plan is the identity."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from atp_edge.config import StructureSpace
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import merge, narrow_model, narrow_peft, widen_lora
from atp_edge.model.plan import all_kept, narrow_shape
from atp_edge.model.structures import count_parameters
from tests.tiny import (
    CUTS,
    FAMILIES,
    PAIR_FAMILIES,
    PAIR_PLANS,
    PLANS,
    logits,
    masks_of,
    tiny_model,
    to_cut,
    with_lora,
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("family", "policy"), CUTS)
def test_masked_equals_narrow_with_lora_kept_and_merged(
    family: str, policy: str, tied: bool
) -> None:
    dense, plan = to_cut(family, policy, tied=tied)
    masked = with_lora(dense, space=plan.space)
    # Masks of numbers really mask; that skipping equals masking, test_compact_site.py holds.
    set_decision(masked, [mask.float() for mask in masks_of(plan)], "whole")
    expected = logits(masked)
    narrow = narrow_peft(masked, plan)
    torch.testing.assert_close(logits(narrow), expected, atol=2e-5, rtol=1e-5)
    merged = merge(narrow)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    shape = model_shape(merged.config)
    assert count_parameters(shape).whole == sum(p.numel() for p in merged.parameters())
    assert shape == narrow_shape(model_shape(dense.config), plan)


@pytest.mark.parametrize("policy", [*PLANS, *PAIR_PLANS])
def test_cutting_really_changes_the_model(policy: str) -> None:
    dense, plan = to_cut("llama", policy)
    narrow = narrow_model(dense, plan)
    assert (logits(narrow) - logits(dense)).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "space"),
    [*((f, "groups") for f in FAMILIES), *((f, "head-dims") for f in PAIR_FAMILIES)],
)
def test_an_all_kept_plan_is_the_identity_bit_for_bit(
    family: str, space: StructureSpace, tied: bool
) -> None:
    dense = tiny_model(family, tied=tied)
    narrow = narrow_model(dense, all_kept(model_shape(dense.config), space))
    assert type(narrow) is type(dense)
    assert torch.equal(logits(narrow), logits(dense))
    for (name, ours), theirs in zip(
        narrow.state_dict().items(), dense.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("policy", ["per-layer", "per-layer pairs"])
def test_a_widened_adapter_on_the_masked_dense_model_equals_the_narrow_one(policy: str) -> None:
    model, plan = to_cut("qwen2", policy)
    shape = model_shape(model.config)
    wide = add_lora(copy.deepcopy(model), rank=4, alpha=8.0, seed=9, space=plan.space).eval()
    narrow = narrow_peft(with_lora(model), plan)
    set_peft_model_state_dict(wide, widen_lora(get_peft_model_state_dict(narrow), shape, plan))
    set_decision(wide, masks_of(plan), "whole")
    torch.testing.assert_close(logits(wide), logits(narrow), atol=2e-5, rtol=1e-5)


def test_a_weight_that_is_not_finite_is_not_merged() -> None:
    model = with_lora(tiny_model("llama"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        merge(model)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = all_kept(model_shape(tiny_model("llama", num_hidden_layers=2).config))
    with pytest.raises(ValueError, match="4 sites, the model 6"):
        narrow_model(tiny_model("llama"), plan)


def test_a_family_whose_norms_run_over_a_head_keeps_its_head_dimensions() -> None:
    with pytest.raises(ValueError, match=r"decision\.space = 'head-dims': qwen3 norms .*'groups'"):
        all_kept(model_shape(tiny_model("qwen3").config), "head-dims")
