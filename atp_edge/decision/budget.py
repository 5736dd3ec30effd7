"""What may stay: the budget, the decisions that meet it, and its penalty."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from atp_edge.config import StructureSpace, WidthsPolicy
from atp_edge.model.export_size import Shipped, around_bytes, site_bytes
from atp_edge.model.families import LayerShape, ModelShape
from atp_edge.model.plan import narrow_attention
from atp_edge.model.structures import (
    Site,
    SiteKind,
    count_parameters,
    fixed_layer_parameters,
    sites_of,
)

BudgetKind = Literal["params", "model-params", "bytes"]

# Of kept RoPE pairs: head_dim in multiples of 16, as ONNX Runtime's GroupQueryAttention wants it.
PAIRS_STEP = 8

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cost and how much of it may stay.

    params: share of the decoder layers' parameters. model-params: share of all parameters.
    bytes: all files of the exported folder.
    """

    kind: BudgetKind
    value: float


def parse_budget(text: str) -> Budget:
    """Read `params=0.6`, `model-params=0.7` or `bytes=300MB`. Raises ValueError."""
    expected = "expected params=SHARE, model-params=SHARE (0 < SHARE <= 1) or bytes=SIZE (300MB)"
    kind, _, value = text.partition("=")
    try:
        if kind == "bytes":
            match = re.fullmatch(r"([0-9.]+)\s*([KMG]?I?B)", value.strip().upper())
            if match is None:
                raise ValueError
            return Budget(kind="bytes", value=float(match[1]) * _UNITS[match[2]])
        if kind in ("params", "model-params") and 0 < float(value) <= 1:
            return Budget(kind="params" if kind == "params" else "model-params", value=float(value))
    except ValueError:
        pass
    raise ValueError(f"budget {text!r}: {expected}")


def allowed_parameters(budget: Budget, shape: ModelShape) -> int:
    """Decoder parameters that may stay under a budget of parameters."""
    count = count_parameters(shape)
    if budget.kind == "params":
        return math.floor(budget.value * count.decoder)
    return math.floor(budget.value * count.whole) - count.around


@dataclass(frozen=True, kw_only=True)
class FeasibleDecisions:
    """The decisions among which the projection chooses: those that meet the budget."""

    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    """Widths of a site are multiples of its step (or the site's whole size)."""
    costs: tuple[tuple[int, ...], ...]
    """What a site costs at 0 steps, 1 step and so on: parameters, or bytes where the budget is."""
    room: int
    """What all sites may cost together."""
    allowed: int
    """Parameters of removable structures that may stay, over all sites; about, under bytes."""
    fixed: int
    """Decoder parameters that no decision removes."""
    uniform: bool
    uniform_attention: tuple[int, ...]
    """Widths of attention that a uniform decoder of this family can have."""

    @property
    def dense(self) -> int:
        """Decoder parameters of the dense model."""
        return self.fixed + sum(s.size * s.unit_parameters for s in self.sites)

    @property
    def target_share(self) -> float:
        return (self.fixed + self.allowed) / self.dense

    def kept_share(self, masks: list[Tensor]) -> Tensor:
        """Share of the decoder's parameters that masks [size] per site keep (differentiable)."""
        flat = torch.cat(masks).double()
        return (flat @ self._units.to(flat.device) + self.fixed) / self.dense

    @cached_property
    def _units(self) -> Tensor:
        """Parameters of every structure of every site, one site after the other."""
        each = [torch.full((s.size,), float(s.unit_parameters)).double() for s in self.sites]
        return torch.cat(each)


def feasible_decisions(
    shape: ModelShape,
    budget: Budget,
    *,
    widths: WidthsPolicy,
    width_multiple: int,
    structures: StructureSpace = "groups",
    shipped: Shipped | None = None,
) -> FeasibleDecisions:
    """The feasible decisions. shipped: how the model ships, for a budget in bytes.

    Raises ValueError where nothing meets the budget, naming the nearest that can be met.
    """
    sites = sites_of(shape, structures)
    if width_multiple < 1:
        raise ValueError(f"width multiple {width_multiple}: expected 1 or more")
    multiples = {"attention": 1 if structures == "groups" else PAIRS_STEP, "mlp": width_multiple}
    steps = tuple(min(multiples[s.kind], s.size) for s in sites)
    fixed, limit = _limits(shape, budget, shipped)
    costs = _costs(shape, sites, steps, shipped if budget.kind == "bytes" else None)
    attention = _uniform_attention(shape, sites[0], steps[0])
    fewest = {"mlp": 1, "attention": -(-attention[0] // steps[0]) if widths == "uniform" else 1}
    smallest = sum(cost[fewest[s.kind]] for cost, s in zip(costs, sites, strict=True))
    if fixed + smallest > limit:
        raise ValueError(_too_small(shape, budget, fixed + smallest, width_multiple))
    whole = sum(cost[-1] for cost in costs)
    room = min(limit - fixed, whole)
    return FeasibleDecisions(
        sites=sites,
        steps=steps,
        costs=costs,
        room=room,
        allowed=sum(s.size * s.unit_parameters for s in sites) * room // whole,
        fixed=fixed_layer_parameters(shape),
        uniform=widths == "uniform",
        uniform_attention=attention,
    )


def _limits(shape: ModelShape, budget: Budget, shipped: Shipped | None) -> tuple[int, int]:
    """(what no decision removes, what the whole may cost), in the budget's unit."""
    if budget.kind != "bytes":
        return fixed_layer_parameters(shape), allowed_parameters(budget, shape)
    if shipped is None:
        raise ValueError("a budget in bytes follows from how the model ships: give `shipped`")
    return around_bytes(shape, shipped.storage) + shipped.beside, math.floor(budget.value)


def _costs(
    shape: ModelShape, sites: Sequence[Site], steps: Sequence[int], shipped: Shipped | None
) -> tuple[tuple[int, ...], ...]:
    """What every site costs at 0 steps, 1 step and so on: bytes as shipped, or else parameters."""
    known: dict[tuple[LayerShape, SiteKind], tuple[int, ...]] = {}
    for site, step in zip(sites, steps, strict=True):
        layer = shape.layers[site.layer]
        if (layer, site.kind) in known:
            continue
        widths = (*range(step, site.size, step), site.size)
        if shipped is None:
            each = [width * site.unit_parameters for width in widths]
        else:
            narrow = (_narrow(layer, site, width) for width in widths)
            each = [site_bytes(shape, shipped.storage, x, site.kind) for x in narrow]
        known[layer, site.kind] = (0, *itertools.accumulate(each, max))
    return tuple(known[shape.layers[site.layer], site.kind] for site in sites)


def _narrow(layer: LayerShape, site: Site, width: int) -> LayerShape:
    """A dense layer with so many structures of a site: the last ones, whose numbers are longest."""
    if site.kind == "mlp":
        return replace(layer, channels=width)
    return narrow_attention(layer, tuple(range(site.size - width, site.size)), site.space)


def _uniform_attention(shape: ModelShape, site: Site, step: int) -> tuple[int, ...]:
    if site.space == "head-dims":
        return (*range(step, site.size, step), site.size)
    # transformers' Llama configuration wants hidden_size divisible by the number of heads.
    layer = shape.layers[0]
    return tuple(
        groups
        for groups in range(1, layer.kv_heads + 1)
        if shape.family != "llama" or shape.hidden % (groups * layer.group_heads) == 0
    )


def _too_small(shape: ModelShape, budget: Budget, smallest: int, multiple: int) -> str:
    """smallest: the least that can be had, in the budget's unit."""
    count = count_parameters(shape)
    nearest = {
        "params": f"params={math.ceil(smallest / count.decoder * 1e4) / 1e4}",
        "model-params": "model-params="
        f"{math.ceil((smallest + count.around) / count.whole * 1e4) / 1e4}",
        "bytes": f"bytes={_megabytes(smallest)}",
    }[budget.kind]
    given = _megabytes(budget.value) if budget.kind == "bytes" else f"{budget.value:g}"
    return (
        f"budget {budget.kind}={given} cannot be met: one width step of attention and one of "
        f"channels ({multiple}, decision.width_multiple) must stay in every layer; the smallest "
        f"budget for this model is {nearest}"
    )


def _megabytes(value: float) -> str:
    """Rounded up to four digits or more, as `parse_budget` reads it."""
    return f"{math.ceil(value / 1e3)}KB" if value < 1e7 else f"{math.ceil(value / 1e4) / 100:g}MB"


def budget_penalty(kept: Tensor, target: float, weight: float) -> Tensor:
    """alpha * log(max(P, p) / min(P, p)), zero when the share kept is the target (ATP, eq. 9)."""
    ratio = kept / target
    return weight * torch.log(torch.maximum(ratio, 1 / ratio))
