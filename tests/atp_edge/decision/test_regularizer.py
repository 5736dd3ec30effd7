"""The group lasso and its proximal step."""

from __future__ import annotations

import pytest
import torch

from atp_edge.config import StructureSpace
from atp_edge.decision.regularizer import group_lasso, proximal_step
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import lora_layer
from tests.tiny import (
    SPACES,
    TRAIN_IDS,
    feasible_of,
    lora_model,
    random_masks,
)


@pytest.mark.parametrize("structures", SPACES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_proximal_step_reaches_exact_zero_and_then_cutting_changes_nothing(
    family: str, structures: StructureSpace
) -> None:
    model = lora_model(family, structures=structures)
    feasible = feasible_of(model)
    masks = random_masks(feasible)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = float(group_lasso(model, masks).detach())
    proximal_step(model, masks, 0.05)
    assert 0 < float(group_lasso(model, masks).detach()) < before
    proximal_step(model, masks, 100.0)
    assert float(group_lasso(model, masks).detach()) == 0.0
    kept = lora_layer(model, 0, "up_proj").lora_B["default"].weight[masks[1]]
    assert kept.abs().min() > 0
    if family == "qwen2":  # biases of removed heads stay in the LoRA-aware forward's other path
        return
    outputs = []
    for placement in ("base", "whole"):
        set_decision(model, masks, placement)  # type: ignore[arg-type]
        with torch.no_grad():
            outputs.append(model(input_ids=TRAIN_IDS[:2]).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
