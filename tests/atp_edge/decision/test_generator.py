"""The generator and its decisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atp_edge.config import StructureSpace
from atp_edge.decision.generator import ALL_KEPT_BASE, DecisionGenerator, decide
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from tests.tiny import BLOCKS, SPACES, feasible_of, lora_model


def test_a_generator_starts_all_kept_or_at_the_importance() -> None:
    feasible = feasible_of(lora_model())
    torch.manual_seed(0)
    base = [torch.randn(s.size) for s in feasible.sites]
    for logits, start in zip(DecisionGenerator(feasible.sites, base)(), base, strict=True):
        assert torch.equal(logits, start)
    all_kept = DecisionGenerator(feasible.sites)()
    assert float(torch.cat(all_kept).detach().mean()) == pytest.approx(ALL_KEPT_BASE, abs=0.5)


def test_a_decision_is_binary_meets_the_budget_and_carries_gradients() -> None:
    feasible = feasible_of(lora_model())
    generator = DecisionGenerator(feasible.sites)
    noise = torch.Generator().manual_seed(1)
    decision = decide(generator(), feasible, temperature=0.4, noise=noise)
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in decision.masks)
    assert float(feasible.kept_share(decision.masks).detach()) <= feasible.target_share
    sum(m.sum() for m in decision.masks).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for p in generator.heads.parameters())


def test_noise_follows_from_its_seed() -> None:
    feasible = feasible_of(lora_model())
    logits = [torch.zeros(s.size) for s in feasible.sites]

    def drawn(seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        return torch.cat(decide(logits, feasible, temperature=0.4, noise=noise).masks)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("structures", SPACES)
def test_generator_steps_bring_gradients_of_the_loss_to_every_site(
    structures: StructureSpace,
) -> None:
    model = lora_model(structures=structures)
    feasible = feasible_of(model)
    masks = [torch.ones(s.size, requires_grad=True) for s in feasible.sites]
    set_decision(model, masks, "whole")
    for gradient in torch.autograd.grad(language_loss(model, BLOCKS.first(2)), masks):
        assert gradient.abs().min() > 0
