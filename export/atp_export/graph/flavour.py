"""What a flavour must say, and what all flavours share: shapes of the cache, the rotary tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto
from torch import Tensor

from atp_edge.model.families import LayerShape, ModelShape
from atp_export.graph.builder import ONNX_TYPES, GraphBuilder

INT64, FLOAT, BOOL, INT32 = (
    TensorProto.INT64,
    TensorProto.FLOAT,
    TensorProto.BOOL,
    TensorProto.INT32,
)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Tables of the rotary embedding, [positions, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Names that all layers read; masks by the layer's sliding window (None: sees everything).

    cos and sin: tables of the dense head's pairs, of which a layer may hold some (`rotary_of`).
    tokens, places: where rows are computed in another order than they came, the tokens in that
    order [B, S], and for every token that came its place there, in [B * S].
    """

    cos: str
    sin: str
    positions: str = ""
    masks: dict[int | None, str]
    lengths: str = ""
    total: str = ""
    tokens: str = ""
    places: str = ""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's attention: its sizes, the names of its cache, its place."""

    shape: LayerShape
    index: int
    past: tuple[str, str]
    present: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Operators:
    """How a flavour writes what the flavours do not write alike.

    inputs(g, shape, ids, mask, rotary): further inputs, and what all layers read.
    norm(g, x, weight, eps, name): RMS norm over the last axis.
    add_norm(g, residual, added, weight, eps, name): (norm of the sum, the sum, `{name}.sum`).
    attend(g, layer, shared, q, k, v): attention [B, S, heads * head_dim] and the new cache; k and v
    are empty when q is packed qkv.
    """

    opset: int
    packed_qkv: bool
    inputs: Callable[[GraphBuilder, ModelShape, str, str, Rotary], Shared]
    norm: Callable[[GraphBuilder, str, str, float, str], str]
    add_norm: Callable[[GraphBuilder, str, str, str, float, str], tuple[str, str]]
    attend: Callable[[GraphBuilder, Layer, Shared, str, str, str], str]


def cache_of(g: GraphBuilder, shape: LayerShape, index: int, cache: int) -> Layer:
    """Declare the cache of one layer, [B, kv_heads, T, head_dim], under the ecosystem's names.

    Caches are numbered by the layers that have attention, without gaps: consumers count them.
    """
    kind = ONNX_TYPES[g.dtype]
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
    return Layer(
        shape=shape, index=index, past=(past[0], past[1]), present=(present[0], present[1])
    )


def rotary_of(g: GraphBuilder, layer: Layer, shared: Shared, *, copies: int = 1) -> tuple[str, str]:
    """cos and sin of the pairs that a layer's heads hold, `copies` times side by side if not all.

    A Gather of columns. Of whole tables, ONNX Runtime folds it when it loads: one table is in the
    file, and in memory one more for every layer that lost pairs, positions * head_dim * 4 bytes.
    """
    pairs = layer.shape.rope_pairs
    if pairs is None:
        return shared.cos, shared.sin
    columns = g.constant(list(pairs) * copies)
    cos, sin = (
        g.node("Gather", [table, columns], axis=-1, name=f"rotary.{layer.index}.{what}")
        for table, what in ((shared.cos, "cos"), (shared.sin, "sin"))
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


def rms_normalization(g: GraphBuilder, x: str, weight: str, eps: float, name: str) -> str:
    """ai.onnx RMSNormalization (opset 23): onnx.checker refuses ONNX Runtime's own name for it."""
    return g.node("RMSNormalization", [x, weight], name=name, axis=-1, epsilon=eps)
