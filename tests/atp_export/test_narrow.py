"""Invariants 1 and 5: masked == narrow in fp32, and an all-kept plan is the identity."""

from __future__ import annotations

import pytest
import torch
from atp_export.narrow import merge, narrow_model, narrow_peft, widen_lora
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel

from atp_edge.families import model_shape
from atp_edge.masked import add_lora, plan_masks, set_decision
from atp_edge.plan import Plan, all_kept, plan_of
from atp_edge.structures import count_parameters
from tests.conftest import FAMILIES, tiny_model

IDS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))


def uniform_plan(model: PreTrainedModel) -> Plan:
    return plan_of(
        model_shape(model.config), [(0,), (1, 2, 5, 39), (2,), (0, 3, 4, 7), (1,), (6, 8, 9, 10)]
    )


def per_layer_plan(model: PreTrainedModel) -> Plan:
    return plan_of(
        model_shape(model.config),
        [(0, 2), (1, 2, 5, 39), (1,), tuple(range(40)), (0, 1, 2), (7,)],
    )


PLANS = {"uniform": uniform_plan, "per-layer": per_layer_plan}


def with_lora(model: PreTrainedModel, seed: int = 3) -> PeftModel:
    """LoRA whose both factors are away from zero."""
    peft = add_lora(model, rank=4, alpha=8.0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return peft.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("policy", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_narrow_with_lora_kept_and_merged(
    family: str, policy: str, tied: bool
) -> None:
    masked = with_lora(tiny_model(family, tied=tied))
    plan = PLANS[policy](masked.get_base_model())
    # Masks of numbers really mask; that skipping equals masking, test_skipping.py holds.
    set_decision(masked, [mask.float() for mask in plan_masks(plan)], "whole")
    expected = logits(masked)
    narrow = narrow_peft(masked, plan)
    torch.testing.assert_close(logits(narrow), expected, atol=2e-5, rtol=1e-5)
    merged = merge(narrow)
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    shape = model_shape(merged.config)
    assert count_parameters(shape).whole == sum(p.numel() for p in merged.parameters())


@pytest.mark.parametrize("policy", PLANS)
def test_cutting_really_changes_the_model(policy: str) -> None:
    dense = tiny_model("llama")
    narrow = narrow_model(dense, PLANS[policy](dense))
    assert (logits(narrow) - logits(dense)).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_all_kept_plan_is_the_identity_bit_for_bit(family: str, tied: bool) -> None:
    dense = tiny_model(family, tied=tied)
    narrow = narrow_model(dense, all_kept(model_shape(dense.config)))
    assert torch.equal(logits(narrow), logits(dense))
    for (name, ours), theirs in zip(
        narrow.state_dict().items(), dense.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_widened_adapter_on_the_masked_dense_model_equals_the_narrow_one() -> None:
    dense = with_lora(tiny_model("qwen2"))
    plan = per_layer_plan(dense.get_base_model())
    shape = model_shape(dense.get_base_model().config)
    narrow = narrow_peft(dense, plan)
    wide = add_lora(tiny_model("qwen2"), rank=4, alpha=8.0, seed=9).eval()
    set_peft_model_state_dict(wide, widen_lora(get_peft_model_state_dict(narrow), shape, plan))
    set_decision(wide, plan_masks(plan), "whole")
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
