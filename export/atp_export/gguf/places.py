"""Where every tensor of a checkpoint lies in the file, by the `gguf` package's own map of names.

llama.cpp's graphs are fixed, so what a family computes otherwise goes into its weights: a norm
that multiplies by 1 + w is written as 1 + w, and factors of scores as rows of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from atp_edge.model.families import LayerShape, ModelShape, module_path
from atp_edge.model.families.record import PARTS
from atp_export.gguf.architecture import LLAMA, PER_LAYER, Architecture
from atp_export.gguf.rope import Angles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOP = (EMBEDDING, "model.norm.weight", HEAD)
ONE_EACH = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
BASE_OF_HEADS = {"gemma2": 46, "gemma3": 62}
"""Layers of Gemma's 27B: llama.cpp takes hidden size / heads for the scale of its scores."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor of the file: rows of one of the checkpoint, added to, multiplied, in an order.

    source: the checkpoint's name; rows: (first, end), None: all. order: the row of the source that
    each row of the file is; factors: of each row, before it is moved.
    """

    source: str
    target: str
    rows: tuple[int, int] | None = None
    offset: float = 0.0
    factors: Tensor | None = None
    order: Tensor | None = None

    def size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The size in the file of a tensor of this shape."""
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    def stored(self, tensor: Tensor) -> Tensor:
        """The checkpoint's tensor, fp32, as the file has it."""
        taken = tensor if self.rows is None else tensor[slice(*self.rows)]
        taken = taken + self.offset if self.offset else taken
        if self.factors is not None:
            taken = taken * self.factors.view(-1, *(1,) * (taken.ndim - 1))
        return taken if self.order is None else taken[self.order]

    def restored(self, stored: Tensor) -> Tensor:
        """The file's tensor as the checkpoint has its rows."""
        found = stored
        if self.order is not None:
            found = torch.empty_like(stored)
            found[self.order] = stored
        if self.factors is not None:
            found = found / self.factors.view(-1, *(1,) * (found.ndim - 1))
        return found - self.offset if self.offset else found


def places_of(shape: ModelShape, named: Architecture, angles: Angles) -> list[Place]:
    """Every tensor of weights, in the file's order."""
    names = _Names(named, len(shape.layers))
    found = [
        Place(source=name, target=names.of(name), offset=_offset(shape, name))
        for name in TOP
        if name != HEAD or not shape.tied
    ]
    if shape.tied and named.head == "own":
        found.append(Place(source=EMBEDDING, target=names.of(HEAD)))
    for i, layer in enumerate(shape.layers):
        found += [
            *_norms(shape, layer, named, names, i),
            *_matrices(shape, i, named, names, angles),
        ]
    return found


class _Names:
    """The file's name of a module's tensor."""

    def __init__(self, named: Architecture, layers: int) -> None:
        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[named.name]
        self.map = get_tensor_name_map(MODEL_ARCH(arch), layers)
        self.kind = named.name

    def of(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        found = self.map.get_name(module)
        if found is None:
            raise ValueError(f"{name}: the package gguf has no place for it in {self.kind!r}")
        return f"{found}.{kind}"


def _offset(shape: ModelShape, name: str) -> float:
    return shape.layout.norm_offset if "norm" in name else 0.0


def _norms(
    shape: ModelShape, layer: LayerShape, named: Architecture, names: _Names, i: int
) -> Iterator[Place]:
    at = f"model.layers.{i}"
    for own in shape.layout.norms.names:
        name = f"{at}.{own}.weight"
        yield Place(source=name, target=names.of(name), offset=_offset(shape, name))
    if (heads := shape.layout.head_norms) is not None:
        for own in (heads.query, heads.key):
            name = f"{at}.self_attn.{own}.weight"
            place = Place(source=name, target=names.of(name), offset=_offset(shape, name))
            share = _share_of_scores(shape, layer, named) if own == heads.query else 1.0
            yield place if share == 1 else _times(place, torch.full((layer.head_dim,), share))


def _share_of_scores(shape: ModelShape, layer: LayerShape, named: Architecture) -> float:
    """The model's factor of scores over the one that Gemma's graphs take."""
    if named.name not in BASE_OF_HEADS or shape.scales.attention is None:
        return 1.0
    wide = len(shape.layers) == BASE_OF_HEADS[named.name]
    base = shape.hidden // layer.heads if wide else layer.head_dim
    return float(shape.scales.attention * base**0.5)


def _matrices(
    shape: ModelShape, i: int, named: Architecture, names: _Names, angles: Angles
) -> Iterator[Place]:
    """Fused ones are taken apart but where the architecture has them fused."""
    layer = shape.layers[i]
    for projection in (*shape.layout.attention, *shape.layout.mlp):
        path, parts = module_path(i, projection), PARTS[projection]
        whole = len(parts) == 1 or named.name not in (LLAMA, PER_LAYER)
        for kind in ("weight", *(["bias"] if projection in shape.biased else [])):
            source, first = f"{path}.{kind}", 0
            if whole:
                place = Place(source=source, target=names.of(source))
                yield _turned(place, parts[0], shape, layer, named, angles)
                continue
            for part in parts:
                rows = (first, first + layer.rows(part))
                first = rows[1]
                target = names.of(f"{module_path(i, ONE_EACH[part])}.{kind}")
                place = Place(source=source, target=target, rows=rows)
                yield _turned(place, part, shape, layer, named, angles)


def _turned(
    place: Place, part: str, shape: ModelShape, layer: LayerShape, named: Architecture, angles: Any
) -> Place:
    """Rows of queries and keys: as RoPE of the architecture wants them, and with their factors."""
    if part not in ("q", "k"):
        return place
    heads = layer.heads if part == "q" else layer.kv_heads
    turned = 2 * shape.rotary_pairs
    if named.paired and not shape.layout.interleaved:
        halves = torch.arange(turned).view(2, -1).T.flatten()
        one = torch.cat([halves, torch.arange(turned, layer.head_dim)])
        starts = torch.arange(heads) * layer.head_dim
        place = replace(place, order=(starts[:, None] + one).flatten())
    factors = torch.ones(layer.head_dim)
    factors[:turned] *= angles.scale
    if part == "q" and not shape.qk_norm:
        factors *= _share_of_scores(shape, layer, named)
    return place if bool((factors == 1).all()) else _times(place, factors.repeat(heads))


def _times(place: Place, factors: Tensor) -> Place:
    return replace(place, factors=factors)
