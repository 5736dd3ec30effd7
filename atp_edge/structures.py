"""Sites, their structures, and what each costs, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atp_edge.families import LayerShape, ModelShape

SiteKind = Literal["attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Attention or MLP of one layer: `size` structures of `unit_parameters` each.

    An attention structure is a KV group (a KV head with its query heads, cut from q, k, v and o
    together); an MLP structure is a channel (a row of gate and up, a column of down).
    """

    layer: int
    kind: SiteKind
    size: int
    unit_parameters: int

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


def _group_parameters(shape: ModelShape, layer: LayerShape) -> int:
    """Parameters of one KV group: q and o per query head, k and v once."""
    rows = {"q_proj": layer.group_heads * layer.head_dim, "k_proj": layer.head_dim}
    rows["v_proj"] = layer.head_dim
    biases = sum(n for name, n in rows.items() if name in shape.biased)
    return shape.hidden * (2 * rows["q_proj"] + 2 * layer.head_dim) + biases


def _channel_parameters(shape: ModelShape) -> int:
    return 3 * shape.hidden + len({"gate_proj", "up_proj"} & shape.biased)


def sites_of(shape: ModelShape) -> tuple[Site, ...]:
    """Every site in order: layer by layer, attention before MLP (structure space `groups`)."""
    return tuple(
        site
        for i, layer in enumerate(shape.layers)
        for site in (
            Site(
                layer=i,
                kind="attention",
                size=layer.kv_heads,
                unit_parameters=_group_parameters(shape, layer),
            ),
            Site(
                layer=i,
                kind="mlp",
                size=layer.channels,
                unit_parameters=_channel_parameters(shape),
            ),
        )
    )


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model: those inside the decoder layers, and those around them."""

    decoder: int
    around: int

    @property
    def whole(self) -> int:
        return self.decoder + self.around


def fixed_layer_parameters(shape: ModelShape) -> int:
    """Parameters of all decoder layers that no decision removes: norms and output biases."""
    per_layer = 2 * shape.hidden + shape.hidden * len({"o_proj", "down_proj"} & shape.biased)
    norms = sum(2 * layer.head_dim for layer in shape.layers) if shape.qk_norm else 0
    return per_layer * len(shape.layers) + norms


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Exact parameter counts of a (dense or narrow) decoder; tied embeddings count once."""
    decoder = fixed_layer_parameters(shape) + sum(
        site.size * site.unit_parameters for site in sites_of(shape)
    )
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return ParameterCount(decoder=decoder, around=embeddings + shape.hidden)
