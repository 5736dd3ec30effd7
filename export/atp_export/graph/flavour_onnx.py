"""Flavours `standard` and `portable`: ai.onnx alone, with `position_ids` and any padding.

- standard: opset 23, its Attention, RotaryEmbedding and RMSNormalization.
- portable: the same computation in operators every runtime has had for years, for older consumers:
  opset 18, or 21 for quantized weights (blocked DequantizeLinear).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from atp_edge.model.families import ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.flavour import (
    BOOL,
    FLOAT,
    INT64,
    Layer,
    Operators,
    Rotaries,
    Shared,
    add_then_norm,
    capped,
    gelu,
    in_fp32,
    number,
    rms_normalization,
    rotary_embedding,
    rotary_of,
    rotary_weights,
)

_MASKED = -1e9


def _inputs(g: GraphBuilder, shape: ModelShape, ids: str, mask: str, rotary: Rotaries) -> Shared:
    """An additive mask [B, 1, S, T] a window: causal, and nothing where the mask is 0."""
    positions = g.input("position_ids", INT64, ["batch_size", "sequence_length"])
    length = g.node("Gather", [g.node("Shape", [ids]), g.constant(1)], axis=0)
    total = g.node("Gather", [g.node("Shape", [mask]), g.constant(1)], axis=0)
    zero, one = g.constant(0), g.constant(1)
    keys = g.node("Range", [zero, total, one])
    queries = g.node("Range", [g.node("Sub", [total, length]), total, one])
    column = g.node("Unsqueeze", [queries, g.constant([1])])
    causal = g.node("LessOrEqual", [keys, column])
    real = g.node("Unsqueeze", [g.node("Cast", [mask], to=BOOL), g.constant([1, 2])])
    nothing = g.weight("mask.none", torch.tensor(0.0))
    # Finite: a row of padding that may see nothing would otherwise be a softmax over nothing.
    masked = g.weight("mask.masked", torch.tensor(max(_MASKED, torch.finfo(g.dtype).min / 2)))
    masks: dict[int | None, str] = {}
    for window in {x.sliding_window for x in shape.layers if x.heads}:
        seen = causal
        if window is not None:
            seen = g.node("And", [causal, _within(g, mask, positions, window)])
        allowed = g.node("And", [seen, real])
        masks[window] = g.node("Where", [allowed, nothing, masked], name=f"mask.{window or 'all'}")
    return Shared(rotary=rotary_weights(g, rotary), positions=positions, masks=masks)


def _within(g: GraphBuilder, mask: str, positions: str, window: int) -> str:
    """Which keys a query's window holds, [B, 1, S, T]: counted in tokens of the row, for padding
    between them, as behind a short prompt, has places in the cache."""
    counted = g.node("Sub", [g.node("CumSum", [mask, g.constant(1)]), g.constant(1)])
    keys = g.node("Unsqueeze", [counted, g.constant([1, 2])])
    oldest = g.node("Sub", [positions, g.constant(window)])
    queries = g.node("Unsqueeze", [oldest, g.constant([1, 3])])
    return g.node("Greater", [keys, queries])


def _attend(g: GraphBuilder, layer: Layer, shared: Shared, q: str, k: str, v: str) -> str:
    size, at = layer.shape, layer.index
    if layer.cap is not None:
        # Attention (opset 23) caps scores after it masked them, transformers before.
        q, k = _turned(g, layer, shared, q, k)
        return _scored(g, layer, shared, *(_heads(g, x, size.head_dim) for x in (q, k, v)))
    q, k = _turned(g, layer, shared, q, k)
    said: dict[str, Any] = {"q_num_heads": size.heads, "kv_num_heads": size.kv_heads}
    if layer.scale != size.head_dim**-0.5:
        said["scale"] = layer.scale
    context: list[str] = g.node(
        "Attention",
        [q, k, v, shared.masks[size.sliding_window], *layer.past],
        name=f"attention.{at}",
        outputs=[f"attention.{at}", *layer.present],
        **said,
    )
    return context[0]


def _turned(g: GraphBuilder, layer: Layer, shared: Shared, q: str, k: str) -> tuple[str, str]:
    """Queries and keys turned by the layer's RoPE, if it has one."""
    if layer.rope is None:
        return q, k
    at, size, tables = f"rotary.{layer.index}", layer.shape, rotary_of(g, layer, shared)
    q = rotary_embedding(g, layer, shared, tables, q, size.heads, f"{at}.q")
    return q, rotary_embedding(g, layer, shared, tables, k, size.kv_heads, f"{at}.k")


STANDARD = Operators(
    opset=23,
    packed_qkv=False,
    inputs=_inputs,
    norm=rms_normalization,
    add_norm=add_then_norm(rms_normalization),
    rotate=rotary_embedding,
    attend=_attend,
    gelu=gelu,
)


def _portable_inputs(
    g: GraphBuilder, shape: ModelShape, ids: str, mask: str, rotary: Rotaries
) -> Shared:
    """As `_inputs`, but cos and sin are those of the tokens, [B, 1, S, dimensions that are turned]
    (interleaved: half of them), gathered once."""
    shared = _inputs(g, shape, ids, mask, rotary)

    def of_tokens(table: str) -> str:
        half = g.node("Gather", [table, shared.positions])
        whole = half if shape.layout.interleaved else g.node("Concat", [half, half], axis=-1)
        return g.node("Unsqueeze", [whole, g.constant([1])])

    gathered = {name: (of_tokens(c), of_tokens(s)) for name, (c, s) in shared.rotary.items()}
    return replace(shared, rotary=gathered)


def _portable_norm(g: GraphBuilder, x: str, weight: str, eps: float, name: str) -> str:
    """x / sqrt(mean(x^2) + eps) in fp32, whatever the graph's type, as transformers computes it."""
    narrow = g.dtype != torch.float32
    wide = g.node("Cast", [x], to=FLOAT) if narrow else x
    squares = g.node("ReduceMean", [g.node("Mul", [wide, wide]), g.constant([-1])], keepdims=1)
    label = f"eps.{eps}"
    if not g.has(label):
        g.tensor(label, torch.tensor(eps, dtype=torch.float32))
    spread = g.node("Sqrt", [g.node("Add", [squares, label])])
    normed = g.node("Div", [wide, spread])
    if narrow:
        normed = g.node("CastLike", [normed, x])
    return g.node("Mul", [normed, weight], name=name)


def _portable_attend(g: GraphBuilder, layer: Layer, shared: Shared, q: str, k: str, v: str) -> str:
    """Attention in operators that every runtime has."""
    size = layer.shape
    q, k, v = (_heads(g, x, size.head_dim) for x in (q, k, v))
    if layer.rope is not None:
        tables = rotary_of(g, layer, shared, copies=2)
        q, k = (_rotate(g, layer, x, *tables) for x in (q, k))
    return _scored(g, layer, shared, q, k, v)


def _portable_rotate(
    g: GraphBuilder,
    layer: Layer,
    shared: Shared,
    tables: tuple[str, str],
    x: str,
    heads: int,
    name: str,
) -> str:
    """RoPE on [B, S, heads * D]."""
    turned = _rotate(g, layer, _heads(g, x, layer.shape.head_dim), *tables)
    rows = g.node("Transpose", [turned], perm=[0, 2, 1, 3])
    return g.node("Reshape", [rows, g.constant([0, 0, -1])], name=name)


def _scored(g: GraphBuilder, layer: Layer, shared: Shared, q: str, k: str, v: str) -> str:
    """Softmax(scale q k^T + mask) v of heads [B, heads, S, D], the query heads of a KV head side by
    side."""
    size = layer.shape
    k, v = (
        g.node("Concat", [old, new], axis=2, name=name, outputs=[name])
        for old, new, name in zip(layer.past, (k, v), layer.present, strict=True)
    )
    grouped = g.constant([0, size.kv_heads, size.group_heads, -1, size.head_dim])
    keys = g.node("Unsqueeze", [g.node("Transpose", [k], perm=[0, 1, 3, 2]), g.constant([2])])
    values = g.node("Unsqueeze", [v, g.constant([2])])
    scale = f"scale.{size.head_dim}"
    if not g.has(scale):
        g.weight(scale, torch.tensor(layer.scale))
    queries = g.node("Mul", [g.node("Reshape", [q, grouped]), scale])
    mask = g.node("Unsqueeze", [shared.masks[size.sliding_window], g.constant([1])])
    scores = g.node("MatMul", [queries, keys])
    if layer.cap is not None:
        scores = in_fp32(g, scores, lambda x: capped(g, x, layer.cap))
    scores = g.node("Add", [scores, mask])
    mixed = g.node("MatMul", [g.node("Softmax", [scores], axis=-1), values])
    heads = g.node("Reshape", [mixed, g.constant([0, size.heads, -1, size.head_dim])])
    rows = g.node("Transpose", [heads], perm=[0, 2, 1, 3])
    return g.node("Reshape", [rows, g.constant([0, 0, -1])], name=f"attention.{layer.index}")


def _heads(g: GraphBuilder, x: str, head_dim: int) -> str:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    split = g.node("Reshape", [x, g.constant([0, 0, -1, head_dim])])
    return g.node("Transpose", [split], perm=[0, 2, 1, 3])


def _rotate(g: GraphBuilder, layer: Layer, x: str, cos: str, sin: str) -> str:
    """RoPE on heads [B, heads, S, D], or on the first dimensions of them."""
    rest = layer.shape.head_dim - layer.rotary
    if rest:
        sizes = g.constant([layer.rotary, rest])
        x, passed = g.node("Split", [x, sizes], outputs=2, axis=-1)
    turn = _turn_neighbours if layer.interleaved else _turn_halves
    turned = turn(g, x, cos, sin)
    return g.node("Concat", [turned, passed], axis=-1) if rest else turned


def _turn_halves(g: GraphBuilder, x: str, cos: str, sin: str) -> str:
    """x cos + (-x2, x1) sin, halves of the last axis."""
    first, second = g.node("Split", [x], outputs=2, axis=-1, num_outputs=2)
    turned = g.node("Concat", [g.node("Neg", [second]), first], axis=-1)
    return g.node("Add", [g.node("Mul", [x, cos]), g.node("Mul", [turned, sin])])


def _turn_neighbours(g: GraphBuilder, x: str, cos: str, sin: str) -> str:
    """(x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 neighbours on the last axis."""
    pairs = g.node("Reshape", [x, g.constant([0, 0, 0, -1, 2])])
    first, second = (
        g.node("Squeeze", [half, g.constant([-1])])
        for half in g.node("Split", [pairs], outputs=2, axis=-1, num_outputs=2)
    )
    left = g.node("Sub", [g.node("Mul", [first, cos]), g.node("Mul", [second, sin])])
    right = g.node("Add", [g.node("Mul", [second, cos]), g.node("Mul", [first, sin])])
    both = [g.node("Unsqueeze", [half, g.constant([-1])]) for half in (left, right)]
    whole = g.node("Concat", both, axis=-1)
    return g.node("Reshape", [whole, g.constant([0, 0, 0, -1])])


def _portable_gelu(g: GraphBuilder, x: str) -> str:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

    def half_one_plus_tanh(wide: str) -> str:
        cube = g.node("Mul", [g.node("Mul", [wide, wide]), wide])
        inner = g.node("Add", [wide, g.node("Mul", [cube, number(g, 0.044715)])])
        scaled = g.node("Mul", [inner, number(g, math.sqrt(2 / math.pi))])
        one = g.node("Add", [g.node("Tanh", [scaled]), number(g, 1.0)])
        return g.node("Mul", [g.node("Mul", [wide, number(g, 0.5)]), one])

    return in_fp32(g, x, half_one_plus_tanh)


PORTABLE_OPSET = {"plain": 18, "quantized": 21}
PORTABLE = Operators(
    opset=PORTABLE_OPSET["plain"],
    packed_qkv=False,
    inputs=_portable_inputs,
    norm=_portable_norm,
    add_norm=add_then_norm(_portable_norm),
    rotate=_portable_rotate,
    attend=_portable_attend,
    gelu=_portable_gelu,
)
