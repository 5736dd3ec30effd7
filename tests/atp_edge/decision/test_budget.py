"""Invariant 3: the budget is met exactly, within one step of a site, whatever the rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_edge.config import StructureSpace, WidthsPolicy
from atp_edge.decision.budget import (
    FeasibleDecisions,
    allowed_parameters,
    budget_penalty,
    feasible_decisions,
    parse_budget,
)
from atp_edge.decision.projection import project
from atp_edge.model.export_size import Shipped
from atp_edge.model.families import HeadNorms, LayerShape, Layout, ModelShape
from atp_edge.model.plan import narrow_shape, plan_of, shares
from atp_edge.model.storage import Storage
from atp_edge.model.structures import count_parameters, sites_of


def shape_of(
    layers: int = 4, kv_heads: int = 3, channels: int = 50, head_dim: int = 8, **more: object
) -> ModelShape:
    layer = LayerShape(heads=2 * kv_heads, kv_heads=kv_heads, head_dim=head_dim, channels=channels)
    values: dict[str, object] = {
        "family": "qwen3",
        "hidden": 48,
        "vocabulary": 97,
        "tied": True,
        "layers": (layer,) * layers,
        "biased": frozenset({"q_proj", "o_proj", "up_proj"}),
        "layout": Layout(head_norms=HeadNorms()),
        "norm_eps": 1e-6,
    }
    return ModelShape(**(values | more))  # type: ignore[arg-type]


def shape_for(structures: StructureSpace, channels: int = 50) -> ModelShape:
    """A shape that the structure space can cut."""
    if structures == "groups":
        return shape_of(channels=channels)
    return shape_of(channels=channels, head_dim=40, family="llama", layout=Layout())


STRUCTURES = st.sampled_from(["groups", "head-dims"])


def kept_parameters(feasible: FeasibleDecisions, masks: list[torch.Tensor]) -> int:
    return sum(int(m.sum()) * s.unit_parameters for m, s in zip(masks, feasible.sites, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    share=st.floats(0.55, 1.0),
    multiple=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    channels=st.integers(30, 70),
    structures=STRUCTURES,
)
def test_per_layer_projection_spends_the_budget_within_one_step(
    share: float, multiple: int, seed: int, channels: int, structures: StructureSpace
) -> None:
    shape = shape_for(structures, channels)
    feasible = feasible_decisions(
        shape,
        parse_budget(f"params={share}"),
        widths="per-layer",
        width_multiple=multiple,
        structures=structures,
    )
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(s.size, generator=draw) for s in feasible.sites]
    masks = project(logits, feasible).masks
    spent = kept_parameters(feasible, masks)
    assert spent <= feasible.allowed
    missing = [
        (s, step, int(m.sum()))
        for m, s, step in zip(masks, feasible.sites, feasible.steps, strict=True)
        if int(m.sum()) < s.size
    ]
    for site, step, width in missing:
        next_step = min(step, site.size - width)
        assert spent + next_step * site.unit_parameters > feasible.allowed
    for site, step, mask in zip(feasible.sites, feasible.steps, masks, strict=True):
        width = int(mask.sum())
        assert width >= 1
        assert width % step == 0 or width == site.size


@settings(max_examples=100, deadline=None)
@given(
    share=st.floats(0.45, 1.0),
    multiple=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    structures=STRUCTURES,
)
def test_uniform_projection_spends_the_budget_within_one_step_a_layer(
    share: float, multiple: int, seed: int, structures: StructureSpace
) -> None:
    shape = shape_for(structures)
    feasible = feasible_decisions(
        shape,
        parse_budget(f"params={share}"),
        widths="uniform",
        width_multiple=multiple,
        structures=structures,
    )
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(s.size, generator=draw) for s in feasible.sites]
    masks = project(logits, feasible).masks
    spent = kept_parameters(feasible, masks)
    one_step = len(shape.layers) * (multiple + 1) * feasible.sites[1].unit_parameters
    channels = int(masks[1].sum())
    assert spent <= feasible.allowed
    assert spent + one_step > feasible.allowed or channels == shape.layers[0].channels
    assert len({int(m.sum()) for m in masks[0::2]}) == len({int(m.sum()) for m in masks[1::2]}) == 1


def test_the_best_structures_are_kept() -> None:
    feasible = feasible_decisions(
        shape_of(), parse_budget("params=0.5"), widths="per-layer", width_multiple=1
    )
    logits = [torch.linspace(-1, 1, s.size) for s in feasible.sites]
    for mask, logit in zip(project(logits, feasible).masks, logits, strict=True):
        assert logit[mask].min() >= (logit[~mask].max() if (~mask).any() else -2)


def test_uniform_llama_keeps_a_head_count_that_transformers_loads() -> None:
    shape = shape_of(kv_heads=8, family="llama", hidden=64)
    feasible = feasible_decisions(
        shape, parse_budget("params=0.6"), widths="uniform", width_multiple=1
    )
    assert feasible.uniform_attention == (1, 2, 4, 8)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_an_impossible_budget_is_refused_with_the_nearest_that_is_met(widths: str) -> None:
    shape = shape_of()
    with pytest.raises(ValueError, match=r"params=0\.01 cannot be met.*smallest .* params=0\.\d+"):
        feasible_decisions(shape, parse_budget("params=0.01"), widths=widths, width_multiple=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smallest") as refused:
        feasible_decisions(shape, parse_budget("params=0.01"), widths="per-layer", width_multiple=4)
    nearest = str(refused.value).rsplit(" ", 1)[1]
    feasible_decisions(shape, parse_budget(nearest), widths="per-layer", width_multiple=4)


def test_a_width_step_as_wide_as_the_model_is_named() -> None:
    """One step stays in every layer: with 1000 of 50 channels, all do."""
    with pytest.raises(ValueError, match=r"one of channels \(1000, decision\.width_multiple\)"):
        feasible_decisions(
            shape_of(), parse_budget("params=0.5"), widths="per-layer", width_multiple=1000
        )


def test_one_kv_head_cannot_go_so_channels_give_all() -> None:
    shape = shape_of(kv_heads=1)
    feasible = feasible_decisions(
        shape, parse_budget("params=0.6"), widths="per-layer", width_multiple=4
    )
    masks = project([torch.randn(s.size) for s in feasible.sites], feasible).masks
    assert all(mask.all() for mask in masks[::2])
    assert not all(mask.all() for mask in masks[1::2])
    whole = count_parameters(shape).decoder
    kept = kept_parameters(feasible, masks) + feasible.fixed
    assert 0.6 * whole - 4 * feasible.sites[1].unit_parameters < kept <= 0.6 * whole
    with pytest.raises(ValueError, match=r"the smallest budget for this model is params=0\.\d+"):
        feasible_decisions(shape, parse_budget("params=0.01"), widths="per-layer", width_multiple=4)


def test_uniform_widths_of_a_model_of_three_billion() -> None:
    """Llama-3.2-3B: 24 heads of 128 in 8 groups, of which 1, 2, 4 and 8 load in transformers."""
    layer = LayerShape(heads=24, kv_heads=8, head_dim=128, channels=8192)
    own = {"hidden": 3072, "vocabulary": 128_256, "biased": frozenset[str](), "layout": Layout()}
    shape = replace(shape_of(family="llama", **own), layers=(layer,) * 28)

    def kept(budget: str) -> float:
        feasible = feasible_decisions(
            shape, parse_budget(budget), widths="uniform", width_multiple=32
        )
        masks = project([torch.zeros(s.size) for s in feasible.sites], feasible).masks
        assert {int(mask.sum()) for mask in masks[::2]} <= {1, 2, 4, 8}
        whole = count_parameters(shape).decoder
        return (kept_parameters(feasible, masks) + feasible.fixed) / whole

    for share in (0.5, 0.15):
        assert 0.9 * share < kept(f"params={share}") <= share
    with pytest.raises(ValueError, match=r"params=0\.02 cannot be met.* is params=0\.0343"):
        kept("params=0.02")


@pytest.mark.parametrize("budget", ["params=1", "bytes=10GB"])
def test_a_budget_of_all_keeps_all(budget: str) -> None:
    shape = shape_of()
    feasible = feasible_decisions(
        shape, parse_budget(budget), widths="per-layer", width_multiple=4,
        shipped=shipped_as(shape, flavour="ort", precision="fp32"),
    )  # fmt: skip
    assert all(
        m.all() for m in project([torch.randn(s.size) for s in feasible.sites], feasible).masks
    )


@pytest.mark.parametrize(
    "text",
    ["0.6", "params=0", "params=1.5", "params=nan", "bytes=many", "bytes=1.2.3MB", "macs=0.5", ""],
)  # fmt: skip
def test_a_budget_that_is_none_names_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected params=SHARE"):
        parse_budget(text)


def test_budgets_of_the_whole_model_count_the_embeddings() -> None:
    shape = shape_of()
    count = count_parameters(shape)
    whole = allowed_parameters(parse_budget("model-params=0.8"), shape)
    assert whole + count.around <= 0.8 * count.whole < whole + count.around + 1


def shipped_as(shape: ModelShape, **settings: object) -> Shipped:
    storage = Storage(rotary=(256, shape.layers[0].head_dim // 2), **settings)  # type: ignore[arg-type]
    return Shipped(storage=storage, beside=10_000)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.5, 1.0),
    multiple=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    structures=STRUCTURES,
    widths=st.sampled_from(["per-layer", "uniform"]),
    flavour=st.sampled_from(["ort", "standard", "portable"]),
    precision=st.sampled_from(["fp32", "fp16", "int8", "int4"]),
    tied=st.booleans(),
)
def test_a_projection_ships_no_more_bytes_than_the_budget_and_no_step_less(
    share: float,
    multiple: int,
    seed: int,
    structures: StructureSpace,
    widths: WidthsPolicy,
    flavour: str,
    precision: str,
    tied: bool,
) -> None:
    """Whatever blocks and pages round up to. Sizes of a site differ from step to step."""
    shape = replace(shape_for(structures, channels=300), tied=tied, hidden=144)
    shipped = shipped_as(shape, flavour=flavour, precision=precision)
    asked = int(share * shipped.bytes(shape))
    feasible = feasible_decisions(
        shape,
        parse_budget(f"bytes={asked}B"),
        widths=widths,
        width_multiple=multiple,
        structures=structures,
        shipped=shipped,
    )
    draw = torch.Generator().manual_seed(seed)
    masks = project([torch.randn(s.size, generator=draw) for s in feasible.sites], feasible).masks
    kept = [tuple(m.nonzero().flatten().tolist()) for m in masks]
    slim = narrow_shape(shape, plan_of(shape, kept, structures))
    assert shipped.bytes(slim) <= asked
    places = [-(-len(k) // step) for k, step in zip(kept, feasible.steps, strict=True)]
    spent = sum(cost[at] for cost, at in zip(feasible.costs, places, strict=True))
    # The columns that a layer keeps of the rotary tables are counted with their longest names.
    assert (
        0 <= spent + asked - feasible.room - shipped.bytes(slim) <= 2000 or spent == feasible.room
    )
    more = [
        cost[at + 1] - cost[at]
        for cost, at in zip(feasible.costs, places, strict=True)
        if at + 1 < len(cost)
    ]
    if widths == "per-layer":
        assert all(spent + step > feasible.room for step in more)
    else:
        assert len(more) == 0 or spent + sum(more) > feasible.room


def test_a_budget_in_bytes_that_is_too_small_names_one_that_is_met() -> None:
    shape = shape_of(kv_heads=8, family="llama", hidden=64, channels=256)
    shipped = shipped_as(shape, flavour="ort", precision="int4")

    def decisions(budget: str, widths: WidthsPolicy) -> FeasibleDecisions:
        return feasible_decisions(
            shape, parse_budget(budget), widths=widths, width_multiple=32, shipped=shipped
        )

    for widths in get_args(WidthsPolicy):
        with pytest.raises(ValueError, match=r"bytes=20KB cannot be met.* bytes=\d+KB") as refused:
            decisions("bytes=20KB", widths)
        nearest = str(refused.value).rsplit(" ", 1)[1]
        feasible = decisions(nearest, widths)
        masks = project([torch.randn(s.size) for s in feasible.sites], feasible).masks
        assert {int(m.sum()) for m in masks[1::2]} == {32}
    with pytest.raises(ValueError, match="give `shipped`"):
        feasible_decisions(shape, parse_budget("bytes=1MB"), widths="uniform", width_multiple=32)


@pytest.mark.parametrize("structures", ["groups", "head-dims"])
def test_shares_of_a_plan_match_the_narrow_shape(structures: StructureSpace) -> None:
    shape = shape_for(structures)
    feasible = feasible_decisions(
        shape,
        parse_budget("params=0.7"),
        widths="per-layer",
        width_multiple=1,
        structures=structures,
    )
    masks = project([torch.randn(s.size) for s in feasible.sites], feasible).masks
    kept = [tuple(m.nonzero().squeeze(1).tolist()) for m in masks]
    plan = plan_of(shape, kept, structures)
    exact = shares(shape, narrow_shape(shape, plan)).decoder
    assert exact == pytest.approx(float(feasible.kept_share([m.float() for m in masks])), abs=1e-6)
    assert exact <= 0.7


def test_the_penalty_is_zero_at_the_target_and_grows_both_ways() -> None:
    at = [float(budget_penalty(torch.tensor(x), 0.6, 5.0)) for x in (0.3, 0.6, 1.2)]
    assert at == pytest.approx([5 * 0.6931, 0.0, 5 * 0.6931], abs=1e-3)


def test_every_structure_space_counts_the_same_parameters() -> None:
    shape = shape_for("head-dims")
    groups, pairs = (
        [s.size * s.unit_parameters for s in sites_of(shape, structures)]
        for structures in ("groups", "head-dims")
    )
    assert groups == pairs
