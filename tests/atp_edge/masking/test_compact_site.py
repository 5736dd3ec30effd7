"""A fixed decision is skipped, not masked: same loss, same gradients, less work."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from atp_edge.config import StructureSpace
from atp_edge.data.blocks import Blocks
from atp_edge.decision.regularizer import proximal_step
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.compact_site import CompactSite
from atp_edge.masking.lora import add_lora, lora_layer
from atp_edge.model.structures import Masks
from tests.tiny import FAMILIES, PAIR_FAMILIES, tiny_model

IDS = torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(0))
BATCH = Blocks(input_ids=IDS, labels=IDS)


def lora_model(
    family: str = "llama",
    *,
    lora: str = "random",
    retrain: bool = False,
    space: StructureSpace = "groups",
) -> PeftModel:
    model = add_lora(tiny_model(family), rank=4, alpha=8.0, seed=0, space=space)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and lora == "random":
                parameter.normal_(0, 0.2)
            if name.endswith("_proj.base_layer.weight"):
                parameter.requires_grad_(retrain)
    return model


def masks(*kept: tuple[int, ...]) -> Masks:
    """Layers' attention groups that stay, of 3; of the 40 channels every third goes, plus a few."""
    found = []
    for layer, groups in enumerate(kept):
        channels = torch.arange(40) % 3 != layer
        found += [torch.isin(torch.arange(3), torch.tensor(groups)), channels]
    return Masks(found)


DECISION = masks((0, 2), (1,), (0, 1, 2))
# Of structure space `head-dims`: RoPE pairs, of 8.
PAIRS = [torch.isin(torch.arange(8), torch.tensor(kept)) for kept in ((0, 2, 5), (7,), range(8))]
PAIR_DECISION = Masks(m for pair in zip(PAIRS, DECISION[1::2], strict=True) for m in pair)


def gradients(model: PeftModel, others: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The loss and its gradients for all that is trained, and for `others`."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} | (others or {})
    loss = language_loss(model, BATCH.to(model.device))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zeros = (torch.zeros_like(p) for p in parameters.values())
    filled = [z if g is None else g for g, z in zip(found, zeros, strict=True)]
    return {"loss": loss.detach(), **dict(zip(parameters, filled, strict=True))}


def both_ways(model: PeftModel, placement: Any, decision: list[Tensor]) -> None:
    results = []
    for skip in (True, False):
        set_decision(model, decision, placement, skip=skip)
        results.append(gradients(model))
    for name, ours in results[0].items():
        torch.testing.assert_close(ours, results[1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "placement", "lora", "retrain"),
    itertools.product(FAMILIES, ["base", "whole"], ["zero", "random"], [False, True]),
)
def test_every_gradient_equals_masking(
    family: str, placement: str, lora: str, retrain: bool
) -> None:
    both_ways(lora_model(family, lora=lora, retrain=retrain), placement, DECISION)


@pytest.mark.parametrize("placement", ["base", "whole"])
@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_rope_pairs_are_masked_while_channels_are_skipped(family: str, placement: str) -> None:
    model = lora_model(family, retrain=True, space="head-dims")
    both_ways(model, placement, PAIR_DECISION)
    set_decision(model, PAIR_DECISION, "whole")
    assert lora_layer(model, 0, "q_proj").site is None
    assert isinstance(lora_layer(model, 0, "up_proj").site, CompactSite)


@pytest.mark.parametrize("share", ["all", "no channel", "no head"])
def test_sites_kept_or_removed_whole(share: str) -> None:
    decision = masks((0, 1, 2), (0, 1, 2), (0, 1, 2))
    for site, mask in enumerate(decision):
        attention = site % 2 == 0
        mask[:] = not (
            (share == "no channel" and not attention) or (share == "no head" and attention)
        )
    for placement in ("base", "whole"):
        both_ways(lora_model(), placement, decision)


def flops(model: PeftModel, placement: Any) -> float:
    set_decision(model, DECISION, placement)
    with FlopCounterMode(display=False) as counter:
        gradients(model)
    return counter.get_total_flops()


def test_the_work_falls_to_that_of_the_kept_and_base_follows_the_proximal_step() -> None:
    model = lora_model()
    whole, before = flops(model, "whole"), flops(model, "base")
    assert whole < before
    proximal_step(model, DECISION, 100.0)
    # The LoRA of every removed structure is exactly zero: not even its rank-r path is computed.
    assert flops(model, "base") == whole
    set_decision(model, [torch.ones_like(m) for m in DECISION], "base")
    with FlopCounterMode(display=False) as counter:
        gradients(model)
    assert whole < 0.75 * counter.get_total_flops()
    # A factor that comes back (AdamW's momentum moves what has no gradient) is computed again.
    set_decision(model, DECISION, "base")
    with torch.no_grad():
        lora_layer(model, 0, "up_proj").lora_B["default"].weight += 0.1
    assert flops(model, "base") > whole
    both_ways(model, "base", DECISION)


def test_a_dead_group_needs_both_its_values_and_its_output_at_zero() -> None:
    for name in ("v_proj", "o_proj"):
        model = lora_model()
        proximal_step(model, DECISION, 100.0)
        layer = lora_layer(model, 0, name)
        with torch.no_grad():
            if name == "v_proj":
                layer.lora_B["default"].weight[16:32] = 0.3
            else:
                layer.lora_A["default"].weight[:, 32:64] = 0.3
        both_ways(model, "base", DECISION)
        set_decision(model, DECISION, "base")
        found = gradients(model)
        other = "o_proj.lora_A" if name == "v_proj" else "v_proj.lora_B"
        revived = next(g for n, g in found.items() if f"layers.0.self_attn.{other}" in n)
        assert (revived[:, 32:64] if name == "v_proj" else revived[16:32]).any()


def test_gathered_weights_stand_with_the_decision_and_fall_with_the_weight() -> None:
    model = lora_model()
    module = lora_layer(model, 0, "gate_proj")

    def gathered() -> Tensor:
        set_decision(model, [m.clone() for m in DECISION], "whole")
        gradients(model)
        assert isinstance(module.site, CompactSite)
        return module.site._gathered._made["gate_proj"][1]

    first = gathered()
    assert gathered() is first
    with torch.no_grad():
        module.get_base_layer().weight *= 2
    assert not torch.equal(gathered(), first)
    both_ways(model, "whole", DECISION)


def test_autocast_checkpointing_and_copies() -> None:
    model = lora_model()
    set_decision(model, DECISION, "base")
    want = gradients(model)
    copied = gradients(copy.deepcopy(model))
    for name, gradient in want.items():
        assert torch.equal(copied[name], gradient), name
    x = torch.randn(2, 5, 48)
    mlp = model.get_base_model().model.layers[0].mlp
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = mlp(x)
        again = checkpoint(mlp, x, use_reentrant=False)
    assert plain.dtype == torch.bfloat16
    for one, two in zip(
        *(torch.autograd.grad(y.float().square().sum(), parameters) for y in (plain, again)),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def test_a_mask_written_to_is_another_decision() -> None:
    model, decision = lora_model(), [mask.clone() for mask in DECISION]
    set_decision(model, decision, "whole")
    decision[1].logical_not_()
    both_ways(model, "whole", decision)


def test_inference_does_not_spoil_training() -> None:
    model = lora_model()
    set_decision(model, DECISION, "whole")
    with torch.inference_mode():
        model(input_ids=IDS)
    assert gradients(model)["loss"] > 0
