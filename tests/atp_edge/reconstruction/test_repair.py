"""The closed-form repair, and how it moves with the decision."""

from __future__ import annotations

import copy

import pytest
import torch

from atp_edge.config import StructureSpace
from atp_edge.masking.apply import set_decision
from atp_edge.reconstruction.repair import Repair
from tests.tiny import (
    BLOCKS,
    SPACES,
    TRAIN_IDS,
    feasible_of,
    lora_model,
    random_masks,
)


@pytest.mark.parametrize("structures", SPACES)
def test_reconstruction_brings_the_masked_output_nearer(structures: StructureSpace) -> None:
    masked_error, repaired_error = (0.0, 0.0)
    model = lora_model(structures=structures)
    with torch.no_grad():
        dense = model(input_ids=TRAIN_IDS).logits
        masks = random_masks(feasible_of(model), seed=2)
        set_decision(model, masks, "whole")
        masked_error = float((model(input_ids=TRAIN_IDS).logits - dense).square().mean())
        Repair(model, masks, BLOCKS)
        repaired_error = float((model(input_ids=TRAIN_IDS).logits - dense).square().mean())
    assert repaired_error < 0.9 * masked_error


def test_a_repair_that_moves_is_the_repair_of_where_it_went() -> None:
    model = lora_model()
    untouched = copy.deepcopy(model)
    first, second = (random_masks(feasible_of(model), seed=seed) for seed in (2, 3))
    moved = Repair(model, first, BLOCKS)
    moved.move(second)
    afresh = Repair(untouched, second, BLOCKS)
    # The first layer reads the same in both; later ones what another repair before them wrote.
    ours, theirs = (repair.modules[0].get_base_layer().weight for repair in (moved, afresh))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("structures", SPACES)
def test_a_repair_that_comes_back_leaves_no_trace(structures: StructureSpace) -> None:
    model = lora_model(structures=structures)
    first, second, third = (random_masks(feasible_of(model), seed=seed) for seed in (2, 3, 4))
    repair = Repair(model, first, BLOCKS)
    before = [module.get_base_layer().weight.clone() for module in repair.modules]
    repair.move(second)
    assert not torch.allclose(repair.modules[0].get_base_layer().weight, before[0], atol=1e-2)
    repair.move(third)
    repair.move(first)
    for module, weight in zip(repair.modules, before, strict=True):
        torch.testing.assert_close(module.get_base_layer().weight, weight, atol=1e-4, rtol=1e-3)
