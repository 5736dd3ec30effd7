"""Sites, their structures, and what each costs, counted exactly.

A structure of an MLP is a channel. What it is of an attention, the structure space says:

- `groups`: a KV head with its query heads. They are cut whole, and head_dim stays.
- `head-dims`: two dimensions p and p + head_dim / 2 of every head, in q, k, v and o alike: in q and
  k, the pair that RoPE turns by the p-th frequency. The number of heads stays. The paper's space
  (ATP, arXiv 2412.14426) but for two things: Q/K dimensions go in pairs, since RoPE would refill
  single ones, and one pattern serves Q/K and V, so that keys and values stay equally wide, as
  caches and fused attention operators want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atp_edge.config import StructureSpace
from atp_edge.model.families import ModelShape, structured

SiteKind = Literal["attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Attention or MLP of one layer: `size` structures of `unit_parameters` each.

    An attention structure is cut from q, k, v and o together; an MLP structure is a channel (a row
    of gate and up, a column of down).
    """

    layer: int
    kind: SiteKind
    size: int
    unit_parameters: int
    space: StructureSpace = "groups"

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


def to_rows(mask: Tensor, rows: int, space: StructureSpace) -> Tensor:
    """A value a structure [size] -> a value a row (or column) of a projection [rows]."""
    # Rows are heads, a head its dimensions: a group's rows lie side by side, a pair's `size` apart.
    times = rows // len(mask)
    if times == 1:
        return mask
    return mask.repeat(times) if space == "head-dims" else mask.repeat_interleave(times)


def spread(mask: Tensor, parts: Sequence[int], space: StructureSpace) -> Tensor:
    """As `to_rows`, for parts of these many rows one after the other (q, k and v of a fused
    projection)."""
    if len(parts) == 1:
        return to_rows(mask, parts[0], space)
    return torch.cat([to_rows(mask, rows, space) for rows in parts])


def by_structure(values: Tensor, dim: int, size: int, space: StructureSpace) -> Tensor:
    """A view with the rows (or columns) in dimension `dim` told apart, structures first.

    [.., rows, ..] -> [size, .., rows / size, ..]: the inverse of `to_rows`.
    """
    if space == "head-dims":
        return values.unflatten(dim, (-1, size)).movedim(dim + 1, 0)
    return values.unflatten(dim, (size, -1)).movedim(dim, 0)


def parts_by_structure(
    values: Tensor, dim: int, parts: Sequence[int], size: int, space: StructureSpace
) -> list[Tensor]:
    """The view of `by_structure` of every part of these many rows (or columns)."""
    return [by_structure(part, dim, size, space) for part in values.split(list(parts), dim)]


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [n] of one type, with one read by the host for all of them."""
    if not values:
        return []
    return list(torch.cat(list(values)).cpu().split([len(value) for value in values]))


def _attention(shape: ModelShape, index: int, space: StructureSpace) -> Site:
    """Equal shares of q, k, v and o, with the biases of q, k and v and norms over all heads."""
    layer = shape.layers[index]
    size = layer.kv_heads if space == "groups" else layer.head_dim // 2
    queries, keys = (layer.rows(part) // size for part in ("q", "k"))
    writers = shape.layout.attention[:-1]
    biases = sum(sum(structured(layer, name)) // size for name in writers if name in shape.biased)
    unit = shape.hidden * (2 * queries + 2 * keys) + biases
    if shape.layout.norms_all_heads:
        unit += queries + keys
    return Site(layer=index, kind="attention", size=size, unit_parameters=unit, space=space)


def _mlp(shape: ModelShape, index: int, space: StructureSpace) -> Site:
    return Site(
        layer=index,
        kind="mlp",
        size=shape.layers[index].channels,
        unit_parameters=3 * shape.hidden + len(shape.biased.intersection(shape.layout.mlp[:-1])),
        space=space,
    )


def sites_of(shape: ModelShape, space: StructureSpace = "groups") -> tuple[Site, ...]:
    """Every site in order: layer by layer, attention before MLP.

    Raises ValueError for a family that the structure space cannot cut.
    """
    reason = _why_no_pairs(shape) if space == "head-dims" else None
    if reason is not None:
        raise ValueError(
            f"decision.space = 'head-dims': {shape.family} {reason}; take decision.space = 'groups'"
        )
    layers = range(len(shape.layers))
    return tuple(site(shape, i, space) for i in layers for site in (_attention, _mlp))


def _why_no_pairs(shape: ModelShape) -> str | None:
    """Why RoPE pairs of a head cannot be cut exactly; None: they can."""
    if shape.qk_norm:
        return (
            "norms queries and keys over the whole head, so that none of its dimensions can be cut "
            "exactly"
        )
    if (
        shape.layout.interleaved
        or shape.ropes != ("",)
        or any(
            2 * shape.rotary_pairs != layer.head_dim
            for layer in shape.layers
            if layer.rope_pairs is None
        )
    ):
        return "turns a head by RoPE in another way than Llama, whose pairs this space knows"
    if "qkv_proj" in shape.layout.attention:
        return "has q, k and v in one matrix, of which this space cuts no pairs"
    return None


class Masks(tuple[Tensor, ...]):
    """A decision over a model: a mask [size] a site, in the order of `sites_of`."""

    __slots__ = ()

    def of(self, layer: int, kind: SiteKind) -> Tensor:
        """The mask of one site."""
        return self[site_index(layer, kind)]

    def kept(self) -> list[tuple[int, ...]]:
        """The structures that stay, of every site."""
        return [tuple(mask.nonzero().flatten().tolist()) for mask in self]


def site_index(layer: int, kind: SiteKind) -> int:
    """The place of a site in the order of `sites_of`."""
    return 2 * layer + (kind == "mlp")


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
    readers = len({"o_proj", "down_proj"} & shape.biased)
    per_layer = shape.hidden * (len(shape.layout.norms.names) + readers)
    by_head = shape.qk_norm and not shape.layout.norms_all_heads
    norms = sum(2 * layer.head_dim for layer in shape.layers) if by_head else 0
    return per_layer * len(shape.layers) + norms


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Exact parameter counts of a (dense or narrow) decoder; tied embeddings count once."""
    decoder = fixed_layer_parameters(shape) + sum(
        site.size * site.unit_parameters for site in sites_of(shape)
    )
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return ParameterCount(decoder=decoder, around=embeddings + shape.hidden)
