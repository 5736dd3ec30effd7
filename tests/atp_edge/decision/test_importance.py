"""First-order importance, at the start and along the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.data.blocks import Blocks
from atp_edge.decision.importance import (
    importance_of,
    mean_importance,
    scored,
    starting_logits,
    taylor_importance,
)
from atp_edge.decision.projection import project
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import lora_layer
from atp_edge.model.structures import by_structure
from tests.tiny import BLOCKS, feasible_of, lora_model


def importance_to(model: PeftModel, blocks: Blocks) -> list[Tensor]:
    return taylor_importance(model, blocks, feasible_of(model), lambda b: language_loss(model, b))


def test_importance_orders_by_what_a_removal_costs() -> None:
    model = lora_model()
    feasible = feasible_of(model)
    with torch.no_grad():
        lora_layer(model, 1, "down_proj").get_base_layer().weight[:, 3] = 0
    scores = importance_to(model, BLOCKS.first(4))
    assert scores[3][3] == 0
    assert int(scores[3].argmin()) == 3
    logits = starting_logits(scores, feasible)
    masks = project(logits, feasible).masks
    agreeing = torch.cat([(x > 0) == m for x, m in zip(logits, masks, strict=True)])
    assert agreeing.float().mean() > 0.8


def test_importance_is_the_root_of_what_every_token_squares() -> None:
    model = lora_model()
    feasible = feasible_of(model)
    read: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        read.append(inputs[0])

    block = BLOCKS.first(1)
    scores = importance_to(model, block)
    for name in ("o_proj", "down_proj"):
        lora_layer(model, 1, name).register_forward_pre_hook(watch)
    model.enable_input_require_grads()
    language_loss(model, block).backward()
    for z, site, score in zip(read, feasible.sites[2:4], scores[2:4], strict=True):
        assert z.grad is not None
        a_token = (z * z.grad).abs().reshape(-1, site.size, z.shape[-1] // site.size).sum(-1)
        torch.testing.assert_close(score, a_token.square().sum(0).sqrt())


def test_importance_to_all_blocks_is_the_mean_over_parts_of_them() -> None:
    model = lora_model()
    first, rest, whole = (BLOCKS.rows(list(rows)) for rows in (range(3), range(3, 4), range(4)))
    parts = importance_to(model, first), importance_to(model, rest)
    torch.testing.assert_close(mean_importance(*parts, 1 / 4), importance_to(model, whole))


def test_a_batch_scores_like_its_blocks_one_by_one() -> None:
    model = lora_model()
    model.enable_input_require_grads()
    with scored(model, feasible_of(model)) as scores:
        language_loss(model, BLOCKS.first(3)).backward()
    together = importance_of(scores, blocks=3, a_batch=3)
    torch.testing.assert_close(together, importance_to(model, BLOCKS.first(3)))


def pair_scores(model: PeftModel, masks: list[Tensor] | None = None) -> Tensor:
    """Importance of the RoPE pairs of layer 1, under a decision."""
    set_decision(model, masks, "whole")
    return importance_to(model, BLOCKS.first(4))[2]


def test_a_rope_pair_scores_what_it_writes_and_what_it_asks() -> None:
    model = lora_model(structures="head-dims")
    before = pair_scores(model)
    q, o = (lora_layer(model, 1, name).get_base_layer().weight for name in ("q_proj", "o_proj"))
    with torch.no_grad():
        by_structure(q, 0, 16, "head-dims")[3] = 0
    asks_nothing = pair_scores(model)[3]
    with torch.no_grad():
        by_structure(o, 1, 16, "head-dims")[3] = 0
    assert before[3] > asks_nothing > 0
    assert pair_scores(model)[3] == 0


def test_a_removed_rope_pair_is_scored_as_if_it_came_back() -> None:
    model = lora_model(structures="head-dims")
    masks = [torch.ones(s.size) for s in feasible_of(model).sites]
    masks[2][3] = 0
    o = lora_layer(model, 1, "o_proj").get_base_layer().weight
    with torch.no_grad():
        by_structure(o, 1, 16, "head-dims")[3] = 0  # its queries' part of the score alone is left
    removed, kept = pair_scores(model, masks)[3], pair_scores(model)[3]
    assert float(removed) == pytest.approx(float(kept), rel=0.25)
