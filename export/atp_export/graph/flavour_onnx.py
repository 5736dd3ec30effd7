"""Flavours `standard` and `portable`: ai.onnx alone, with `position_ids` and any padding.

- standard: opset 23, its Attention, RotaryEmbedding and RMSNormalization.
- portable: the same computation in operators every runtime has had for years, for older consumers:
  opset 18, or 21 for quantized weights (blocked DequantizeLinear).
"""

from __future__ import annotations

import torch

from atp_edge.model.families import ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.flavour import (
    BOOL,
    FLOAT,
    INT64,
    Layer,
    Operators,
    Rotary,
    Shared,
    add_then_norm,
    rms_normalization,
    rotary_of,
)

_MASKED = -1e9


def _inputs(g: GraphBuilder, shape: ModelShape, ids: str, mask: str, rotary: Rotary) -> Shared:
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
    return Shared(
        cos=g.weight("rotary.cos", rotary.cos),
        sin=g.weight("rotary.sin", rotary.sin),
        positions=positions,
        masks=masks,
    )


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
    rotary = rotary_of(g, layer, shared)
    q, k = (
        g.node(
            "RotaryEmbedding",
            [x, *rotary, shared.positions],
            name=f"rotary.{at}.{what}",
            num_heads=heads,
        )
        for x, what, heads in ((q, "q", size.heads), (k, "k", size.kv_heads))
    )
    context: list[str] = g.node(
        "Attention",
        [q, k, v, shared.masks[size.sliding_window], *layer.past],
        name=f"attention.{at}",
        outputs=[f"attention.{at}", *layer.present],
        q_num_heads=size.heads,
        kv_num_heads=size.kv_heads,
    )
    return context[0]


STANDARD = Operators(
    opset=23,
    packed_qkv=False,
    inputs=_inputs,
    norm=rms_normalization,
    add_norm=add_then_norm(rms_normalization),
    attend=_attend,
)


def _portable_inputs(
    g: GraphBuilder, shape: ModelShape, ids: str, mask: str, rotary: Rotary
) -> Shared:
    """As `_inputs`, but cos and sin are those of the tokens, [B, 1, S, head_dim], gathered once."""
    shared = _inputs(g, shape, ids, mask, rotary)
    cos, sin = (
        g.node(
            "Unsqueeze",
            [
                g.node(
                    "Concat",
                    [half := g.node("Gather", [table, shared.positions]), half],
                    axis=-1,
                ),
                g.constant([1]),
            ],
        )
        for table in (shared.cos, shared.sin)
    )
    return Shared(cos=cos, sin=sin, positions=shared.positions, masks=shared.masks)


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
    """Softmax(q k^T / sqrt(d) + mask) v, the query heads of a KV head side by side."""
    size = layer.shape
    cos, sin = rotary_of(g, layer, shared, copies=2)
    q, k = (_rotate(g, _heads(g, x, size.head_dim), cos, sin) for x in (q, k))
    k, v = (
        g.node("Concat", [old, new], axis=2, name=name, outputs=[name])
        for old, new, name in zip(
            layer.past, (k, _heads(g, v, size.head_dim)), layer.present, strict=True
        )
    )
    grouped = g.constant([0, size.kv_heads, size.group_heads, -1, size.head_dim])
    keys = g.node("Unsqueeze", [g.node("Transpose", [k], perm=[0, 1, 3, 2]), g.constant([2])])
    values = g.node("Unsqueeze", [v, g.constant([2])])
    scale = f"scale.{size.head_dim}"
    if not g.has(scale):
        g.weight(scale, torch.tensor(size.head_dim**-0.5))
    queries = g.node("Mul", [g.node("Reshape", [q, grouped]), scale])
    mask = g.node("Unsqueeze", [shared.masks[size.sliding_window], g.constant([1])])
    scores = g.node("Add", [g.node("MatMul", [queries, keys]), mask])
    mixed = g.node("MatMul", [g.node("Softmax", [scores], axis=-1), values])
    heads = g.node("Reshape", [mixed, g.constant([0, size.heads, -1, size.head_dim])])
    rows = g.node("Transpose", [heads], perm=[0, 2, 1, 3])
    return g.node("Reshape", [rows, g.constant([0, 0, -1])], name=f"attention.{layer.index}")


def _heads(g: GraphBuilder, x: str, head_dim: int) -> str:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    split = g.node("Reshape", [x, g.constant([0, 0, -1, head_dim])])
    return g.node("Transpose", [split], perm=[0, 2, 1, 3])


def _rotate(g: GraphBuilder, x: str, cos: str, sin: str) -> str:
    """x cos + (-x2, x1) sin, halves of the last axis."""
    first, second = g.node("Split", [x], outputs=2, axis=-1, num_outputs=2)
    turned = g.node("Concat", [g.node("Neg", [second]), first], axis=-1)
    return g.node("Add", [g.node("Mul", [x, cos]), g.node("Mul", [turned, sin])])


PORTABLE_OPSET = {"plain": 18, "quantized": 21}
PORTABLE = Operators(
    opset=PORTABLE_OPSET["plain"],
    packed_qkv=False,
    inputs=_portable_inputs,
    norm=_portable_norm,
    add_norm=add_then_norm(_portable_norm),
    attend=_portable_attend,
)
