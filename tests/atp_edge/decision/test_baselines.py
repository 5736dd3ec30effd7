"""The two-stage baselines: within the budget, and in the order each claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atp_edge.config import Config, StructureSpace
from atp_edge.data.blocks import Blocks
from atp_edge.decision.baselines import (
    BASELINES,
    block_influence,
    group_taylor,
    magnitude,
    without_least_layers,
)
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.decision.projection import project
from atp_edge.model.families import model_shape
from atp_edge.model.plan import check_plan, narrow_shape, plan_of, shares
from atp_edge.model.structures import count_parameters
from atp_edge.settings import with_values
from atp_edge.training import setup as inputs
from tests.tiny import tiny_model

IDS = torch.randint(0, 97, (4, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks(input_ids=IDS, labels=IDS)


def feasible_of(
    model: Any,
    share: float = 0.6,
    widths: str = "per-layer",
    structures: StructureSpace = "groups",
) -> FeasibleDecisions:
    return feasible_decisions(
        model_shape(model.config),
        parse_budget(f"params={share}"),
        widths=widths,  # type: ignore[arg-type]
        width_multiple=4,
        structures=structures,
    )


def _call(name: str, model: Any, feasible: FeasibleDecisions) -> Any:
    if name == "torch-pruning":
        pytest.importorskip("torch_pruning", reason="the extra `peers` is not installed")
    masks = project(BASELINES[name](model, BLOCKS, feasible), feasible).masks
    kept = [tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks]
    return plan_of(model_shape(model.config), kept, feasible.sites[0].space)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_meets_the_budget_and_leaves_the_model_as_it_was(name: str, widths: str) -> None:
    model = tiny_model("llama-biases").requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = _call(name, model, feasible_of(model, widths=widths))
    shape = model_shape(model.config)
    check_plan(plan, shape)
    assert 0.5 < shares(shape, narrow_shape(shape, plan)).decoder <= 0.6
    assert plan.uniform or widths == "per-layer"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def _scaled(model: Any, channel: int, group: int, factor: float) -> None:
    """One channel and one KV group of layer 1 made louder or quieter at their outputs."""
    layer = model.model.layers[1]
    width = layer.self_attn.o_proj.in_features // model.config.num_key_value_heads
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, channel] *= factor
        layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] *= factor


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_structure_that_writes_nothing_scores_least_in_its_site(name: str, family: str) -> None:
    if name == "torch-pruning":
        pytest.importorskip("torch_pruning", reason="the extra `peers` is not installed")
    model = tiny_model(family)
    _scaled(model, channel=7, group=1, factor=0.0)
    attention, mlp = BASELINES[name](model, BLOCKS, feasible_of(model))[2:4]
    if name == "magnitude":  # its rows in gate and up still count: lower, not least
        whole = magnitude(tiny_model(family), BLOCKS, feasible_of(model))[2:4]
        assert attention[1] < whole[0][1]
        assert mlp[7] < whole[1][7]
    else:
        assert int(attention.argmin()) == 1
        assert int(mlp.argmin()) == 7


def test_taylor_is_the_first_order_change_summed_over_the_coupled_weights() -> None:
    model = tiny_model("llama")
    feasible = feasible_of(model)
    found = group_taylor(model, BLOCKS, feasible)[1][5]
    for i in range(len(IDS)):
        model(input_ids=IDS[i : i + 1], labels=IDS[i : i + 1]).loss.backward()
    mlp = model.model.layers[0].mlp
    parts = [
        (mlp.gate_proj.weight * mlp.gate_proj.weight.grad)[5],
        (mlp.up_proj.weight * mlp.up_proj.weight.grad)[5],
        (mlp.down_proj.weight * mlp.down_proj.weight.grad)[:, 5],
    ]
    expected = torch.cat(parts).abs().sum() / feasible.sites[1].unit_parameters
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_a_rope_pair_is_scored_by_its_rows_and_columns_of_every_head() -> None:
    model = tiny_model("llama-biases", head_dim=32)
    feasible = feasible_of(model, structures="head-dims")
    attention = model.model.layers[0].self_attn
    heads = {"q_proj": 6, "k_proj": 3, "v_proj": 3}
    total = 0.0
    with torch.no_grad():
        for name, count in heads.items():
            rows = [32 * h + i for h in range(count) for i in (5, 21)]
            part = attention.get_submodule(name)
            total += float((part.weight[rows] ** 2).sum() + (part.bias[rows] ** 2).sum())
        columns = [32 * h + i for h in range(6) for i in (5, 21)]
        total += float((attention.o_proj.weight[:, columns] ** 2).sum())
    found = float(magnitude(model, BLOCKS, feasible)[0][5]) * feasible.sites[0].unit_parameters
    assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["magnitude", "group-taylor", "torch-pruning"])
def test_a_baseline_decides_on_rope_pairs(name: str) -> None:
    model = tiny_model("llama-biases", head_dim=32).requires_grad_(False)
    plan = _call(name, model, feasible_of(model, structures="head-dims"))
    assert plan.space == "head-dims"
    shape = model_shape(model.config)
    assert 0.5 < shares(shape, narrow_shape(shape, plan)).decoder <= 0.6


@pytest.mark.parametrize("name", ["wanda-sp", "flap"])
def test_a_baseline_that_knows_no_rope_pairs_says_so(name: str) -> None:
    model = tiny_model("llama", head_dim=32)
    with pytest.raises(ValueError, match=rf"start = '{name}' scores by .* take importance"):
        BASELINES[name](model, BLOCKS, feasible_of(model, structures="head-dims"))
    # A run hears of it before it trains anything.
    values = {"decision.space": "head-dims", "decision.start": name}
    with pytest.raises(ValueError, match=rf"start = '{name}' scores by"):
        inputs.feasible_of(with_values(Config(), values), model.config)


def test_torch_pruning_finds_the_same_coupled_weights_of_a_channel() -> None:
    pytest.importorskip("torch_pruning", reason="the extra `peers` is not installed")
    model = tiny_model("llama")
    feasible = feasible_of(model)
    theirs = BASELINES["torch-pruning"](model, BLOCKS, feasible)[1::2]
    for ours, found in zip(group_taylor(model, BLOCKS, feasible)[1::2], theirs, strict=True):
        torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_layer_that_changes_nothing_is_removed_first_and_costs_nothing(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        for projection in (
            model.model.layers[1].self_attn.o_proj,
            model.model.layers[1].mlp.down_proj,
        ):
            projection.weight.zero_()
    assert int(block_influence(model, BLOCKS).argmin()) == 1
    slim = without_least_layers(model, BLOCKS, feasible_of(model, 0.7))
    dense, narrow = (count_parameters(model_shape(m.config)).decoder for m in (model, slim))
    assert narrow * 3 == dense * 2
    with torch.no_grad():
        torch.testing.assert_close(slim(input_ids=IDS).logits, model(input_ids=IDS).logits)
