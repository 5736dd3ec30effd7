"""What may stay: the budget, the decisions that meet it, and its penalty."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atp_edge.config import StructureSpace, WidthsPolicy
from atp_edge.model.families import ModelShape
from atp_edge.model.structures import Site, count_parameters, fixed_layer_parameters, sites_of

BudgetKind = Literal["params", "model-params", "bytes"]

# Of kept RoPE pairs: head_dim in multiples of 16, as ONNX Runtime's GroupQueryAttention wants it.
PAIRS_STEP = 8

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cost and how much of it may stay.

    params: share of the decoder layers' parameters. model-params: share of all parameters.
    bytes: bytes of all weights at the exported precision.
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


def allowed_parameters(budget: Budget, shape: ModelShape, bytes_per_parameter: float) -> int:
    """Decoder parameters that may stay under a budget."""
    count = count_parameters(shape)
    if budget.kind == "params":
        return math.floor(budget.value * count.decoder)
    if budget.kind == "model-params":
        return math.floor(budget.value * count.whole) - count.around
    return math.floor(budget.value / bytes_per_parameter) - count.around


@dataclass(frozen=True, kw_only=True)
class FeasibleDecisions:
    """The decisions among which the projection chooses: those that meet the budget."""

    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    """Widths of a site are multiples of its step (or the site's whole size)."""
    allowed: int
    """Parameters of removable structures that may stay, over all sites."""
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
        parameters = [
            m.sum().double() * s.unit_parameters for m, s in zip(masks, self.sites, strict=True)
        ]
        return (torch.stack(parameters).sum() + self.fixed) / self.dense


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


def feasible_decisions(
    shape: ModelShape,
    budget: Budget,
    *,
    widths: WidthsPolicy,
    width_multiple: int,
    bytes_per_parameter: float = 4.0,
    structures: StructureSpace = "groups",
) -> FeasibleDecisions:
    """The feasible decisions. Raises ValueError, naming the nearest budget that can be met."""
    sites = sites_of(shape, structures)
    if width_multiple < 1:
        raise ValueError(f"width multiple {width_multiple}: expected 1 or more")
    multiples = {"attention": 1 if structures == "groups" else PAIRS_STEP, "mlp": width_multiple}
    steps = tuple(min(multiples[s.kind], s.size) for s in sites)
    fixed = fixed_layer_parameters(shape)
    allowed = allowed_parameters(budget, shape, bytes_per_parameter) - fixed
    smallest = sum(s.unit_parameters * step for s, step in zip(sites, steps, strict=True))
    if allowed < smallest:
        raise ValueError(_too_small(shape, budget, fixed + smallest, bytes_per_parameter))
    return FeasibleDecisions(
        sites=sites,
        steps=steps,
        allowed=min(allowed, sum(s.size * s.unit_parameters for s in sites)),
        fixed=fixed,
        uniform=widths == "uniform",
        uniform_attention=_uniform_attention(shape, sites[0], steps[0]),
    )


def _too_small(shape: ModelShape, budget: Budget, decoder: int, bytes_per_parameter: float) -> str:
    count = count_parameters(shape)
    whole = decoder + count.around
    nearest = {
        "params": f"params={math.ceil(decoder / count.decoder * 1e4) / 1e4}",
        "model-params": f"model-params={math.ceil(whole / count.whole * 1e4) / 1e4}",
        "bytes": f"bytes={math.ceil(whole * bytes_per_parameter / 1e6)}MB",
    }[budget.kind]
    given = f"{budget.value / 1e6:g}MB" if budget.kind == "bytes" else f"{budget.value:g}"
    return (
        f"budget {budget.kind}={given} cannot be met: one width step of attention and "
        f"one of channels must stay in every layer; the smallest budget for this model is {nearest}"
    )


def budget_penalty(kept: Tensor, target: float, weight: float) -> Tensor:
    """alpha * log(max(P, p) / min(P, p)), zero when the share kept is the target (ATP, eq. 9)."""
    ratio = kept / target
    return weight * torch.log(torch.maximum(ratio, 1 / ratio))
