"""What a flavour must say, and what all flavours share: shapes of the cache, the rotary tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from atp_edge.model.families import LayerShape, ModelShape
from atp_edge.model.storage import rotary_names
from atp_export.graph.builder import ONNX_TYPES, GraphBuilder

INT64, FLOAT, BOOL, INT32 = (
    TensorProto.INT64,
    TensorProto.FLOAT,
    TensorProto.BOOL,
    TensorProto.INT32,
)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Tables of a rotary embedding, [positions, dimensions that it turns / 2]."""

    cos: Tensor
    sin: Tensor


Rotaries = Mapping[str, Rotary]
"""By the name that layers call them by (`LayerShape.rope`)."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Names that all layers read; masks by the layer's sliding window (None: sees everything).

    rotary: by name, tables (cos, sin) of the dense head's pairs, of which a layer may hold some
    (`rotary_of`).
    tokens, places: where rows are computed in another order than they came, the tokens in that
    order [B, S], and for every token that came its place there, in [B * S].
    """

    rotary: Mapping[str, tuple[str, str]]
    positions: str = ""
    masks: dict[int | None, str]
    lengths: str = ""
    total: str = ""
    tokens: str = ""
    places: str = ""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's attention: its sizes, the names of its cache, its place, its arithmetic.

    rope: the rotary table that attention itself turns queries and keys by; None: it turns none.
    rotary: dimensions of a head that are turned. scale: of the scores. cap: theirs, if any.
    """

    shape: LayerShape
    index: int
    rope: str | None
    rotary: int
    interleaved: bool
    scale: float
    cap: float | None
    past: tuple[str, str]
    present: tuple[str, str]


Rotate = Callable[[GraphBuilder, Layer, Shared, tuple[str, str], str, int, str], str]


@dataclass(frozen=True, kw_only=True)
class Operators:
    """How a flavour writes what the flavours do not write alike.

    inputs(g, shape, ids, mask, rotary): further inputs, and what all layers read.
    norm(g, x, weight, eps, name): RMS norm over the last axis.
    add_norm(g, residual, added, weight, eps, name): (norm of the sum, the sum, `{name}.sum`).
    rotate(g, layer, shared, tables, x, heads, name): x [B, S, heads * head_dim] turned by RoPE, by
    the tables that `rotary_of` gave.
    attend(g, layer, shared, q, k, v): attention [B, S, heads * head_dim] and the new cache, turned
    by RoPE before where the layer has one; k and v are empty when q is packed qkv.
    gelu(g, x): the tanh form of GELU.
    """

    opset: int
    packed_qkv: bool
    inputs: Callable[[GraphBuilder, ModelShape, str, str, Rotaries], Shared]
    norm: Callable[[GraphBuilder, str, str, float, str], str]
    add_norm: Callable[[GraphBuilder, str, str, str, float, str], tuple[str, str]]
    rotate: Rotate
    attend: Callable[[GraphBuilder, Layer, Shared, str, str, str], str]
    gelu: Callable[[GraphBuilder, str], str]


def cache_of(g: GraphBuilder, model: ModelShape, index: int, cache: int) -> Layer:
    """Declare the cache of one layer, [B, kv_heads, T, head_dim], under the ecosystem's names.

    Caches are numbered by the layers that have attention, without gaps: consumers count them.
    """
    kind, shape, scales = ONNX_TYPES[g.dtype], model.layers[index], model.scales
    turned_before = model.layout.head_norms is not None and model.layout.head_norms.after_rope
    past, present = [], []
    for what in ("key", "value"):
        dims: list[str | int] = [
            "batch_size",
            shape.kv_heads,
            "past_sequence_length",
            shape.head_dim,
        ]
        past.append(g.input(f"past_key_values.{cache}.{what}", kind, dims))
        dims = ["batch_size", shape.kv_heads, "total_sequence_length", shape.head_dim]
        present.append(f"present.{cache}.{what}")
        g.output(present[-1], kind, dims)
    whole = 2 * model.rotary_pairs
    return Layer(
        shape=shape,
        index=index,
        rope=None if turned_before else shape.rope,
        rotary=shape.head_dim if shape.rope_pairs is not None else whole,
        interleaved=model.layout.interleaved,
        scale=shape.head_dim**-0.5 if scales.attention is None else scales.attention,
        cap=scales.attention_cap,
        past=(past[0], past[1]),
        present=(present[0], present[1]),
    )


def rotary_weights(g: GraphBuilder, rotaries: Rotaries) -> dict[str, tuple[str, str]]:
    """The tables as tensors of the graph."""
    found = {}
    for name, rotary in rotaries.items():
        cos, sin = rotary_names(name)
        found[name] = g.weight(cos, rotary.cos), g.weight(sin, rotary.sin)
    return found


def rotary_of(g: GraphBuilder, layer: Layer, shared: Shared, *, copies: int = 1) -> tuple[str, str]:
    """cos and sin of the pairs that a layer's heads hold, `copies` times side by side if not all.

    A Gather of columns. Of whole tables, ONNX Runtime folds it when it loads: one table is in the
    file, and in memory one more for every layer that lost pairs, positions * head_dim * 4 bytes.
    """
    pairs, tables = layer.shape.rope_pairs, shared.rotary[layer.shape.rope or ""]
    if pairs is None:
        return tables
    columns = g.constant(list(pairs) * copies)
    cos, sin = (
        g.node("Gather", [table, columns], axis=-1, name=f"rotary.{layer.index}.{what}")
        for table, what in zip(tables, ("cos", "sin"), strict=True)
    )
    return cos, sin


def add_then_norm(
    norm: Callable[[GraphBuilder, str, str, float, str], str],
) -> Callable[[GraphBuilder, str, str, str, float, str], tuple[str, str]]:
    """`add_norm` of flavours that have no fused one."""

    def add_norm(
        g: GraphBuilder, residual: str, added: str, weight: str, eps: float, name: str
    ) -> tuple[str, str]:
        total = g.node("Add", [residual, added], name=f"{name}.sum")
        return norm(g, total, weight, eps, name), total

    return add_norm


def in_fp32(g: GraphBuilder, x: str, compute: Callable[[str], str]) -> str:
    """What `compute` makes of x in fp32, in the graph's type: its numbers stay exact."""
    if g.dtype == torch.float32:
        return compute(x)
    return g.node("CastLike", [compute(g.node("Cast", [x], to=FLOAT)), x])


def number(g: GraphBuilder, value: float) -> str:
    """An fp32 constant, shared by all its readers."""
    label = f"const.{value!r}"
    return label if g.has(label) else g.tensor(label, torch.tensor(value, dtype=torch.float32))


def times(g: GraphBuilder, x: str, factor: float, name: str | None = None) -> str:
    """x * factor; x itself by 1."""
    if factor == 1:
        return x
    value = number(g, factor)
    if g.dtype == torch.float32:
        return g.node("Mul", [x, value], name=name)
    wide = g.node("Mul", [g.node("Cast", [x], to=FLOAT), value])
    return g.node("CastLike", [wide, x], name=name)


def capped(g: GraphBuilder, x: str, cap: float | None) -> str:
    """cap * tanh(x / cap) of an x in fp32; x itself without a cap."""
    if cap is None:
        return x
    value = number(g, cap)
    return g.node("Mul", [g.node("Tanh", [g.node("Div", [x, value])]), value])


def gelu(g: GraphBuilder, x: str) -> str:
    """ai.onnx Gelu (opset 20)."""
    return g.node("Gelu", [x], approximate="tanh")


def rotary_embedding(
    g: GraphBuilder,
    layer: Layer,
    shared: Shared,
    tables: tuple[str, str],
    x: str,
    heads: int,
    name: str,
) -> str:
    """ai.onnx RotaryEmbedding (opset 23)."""
    said: dict[str, Any] = {"num_heads": heads}
    if layer.rotary != layer.shape.head_dim:
        said["rotary_embedding_dim"] = layer.rotary
    if layer.interleaved:
        said["interleaved"] = 1
    return g.node("RotaryEmbedding", [x, *tables, shared.positions], name=name, **said)


def rms_normalization(g: GraphBuilder, x: str, weight: str, eps: float, name: str) -> str:
    """ai.onnx RMSNormalization (opset 23): onnx.checker refuses ONNX Runtime's own name for it."""
    return g.node("RMSNormalization", [x, weight], name=name, axis=-1, epsilon=eps)
