"""Flavour `ort`: com.microsoft operators of ONNX Runtime.

GroupQueryAttention with rotary inside and its KV cache shared in place, packed qkv, residual
additions fused with the norms. Positions follow from the attention mask alone: `position_ids` is no
input, and rows may be padded on either side.
"""

from __future__ import annotations

from typing import Any

from atp_edge.model.families import ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.flavour import (
    INT32,
    INT64,
    Layer,
    Operators,
    Rotaries,
    Shared,
    gelu,
    rms_normalization,
    rotary_embedding,
    rotary_of,
    rotary_weights,
)

# do_rotary of the CPU kernel (ONNX Runtime 1.31, group_query_attention_helper).
_ROTARY_MULTIPLE = 16


def rotated_before(shape: ModelShape) -> bool:
    """Whether RoPE has nodes of its own, before attention."""
    norms = shape.layout.head_norms
    return norms is not None and norms.after_rope


def check_head_dims(shape: ModelShape) -> None:
    """Raises ValueError for heads that GroupQueryAttention cannot rotate."""
    odd = {x.head_dim for x in shape.layers if x.heads and x.head_dim % _ROTARY_MULTIPLE}
    if odd:
        raise ValueError(
            f"head_dim {min(odd)} is no multiple of {_ROTARY_MULTIPLE}, which ONNX Runtime's "
            "GroupQueryAttention needs; export with --export-flavour standard"
        )
    turned = 2 * shape.rotary_pairs
    if turned % _ROTARY_MULTIPLE and not rotated_before(shape) and shape.ropes:
        raise ValueError(
            f"RoPE turns {turned} dimensions of a head, no multiple of {_ROTARY_MULTIPLE}, which "
            "ONNX Runtime's GroupQueryAttention needs; export with --export-flavour standard"
        )


def _inputs(g: GraphBuilder, shape: ModelShape, ids: str, mask: str, rotary: Rotaries) -> Shared:
    """Lengths of GroupQueryAttention: seqlens_k = tokens - 1 a row, and the longest total."""
    check_head_dims(shape)
    moved, places = _padded_on_the_right(g, ids, mask)
    tokens = g.node("ReduceSum", [mask, g.constant([1])], keepdims=0)
    lengths = g.node("Sub", [tokens, g.constant([1])])
    total = g.node("Gather", [g.node("Shape", [mask]), g.constant(1)], axis=0)
    return Shared(
        rotary=rotary_weights(g, rotary),
        positions=_positions(g, ids, tokens) if rotated_before(shape) else "",
        masks={},
        lengths=g.node("Cast", [lengths], to=INT32),
        total=g.node("Cast", [total], to=INT32),
        tokens=moved,
        places=places,
    )


def _positions(g: GraphBuilder, ids: str, tokens: str) -> str:
    """The positions [B, S] of tokens that are padded on the right; tokens: how many each row has,
    [B]. Those before the new ones come first, and in a prefill there are none."""
    count = g.node("Gather", [g.node("Shape", [ids]), g.constant(1)], axis=0)
    before = g.node("Max", [g.node("Sub", [tokens, count]), g.constant(0)])
    steps = g.node("Range", [g.constant(0), count, g.constant(1)])
    column = g.node("Unsqueeze", [before, g.constant([1])])
    return g.node("Add", [column, steps], name="positions")


def _padded_on_the_right(g: GraphBuilder, ids: str, mask: str) -> tuple[str, str]:
    """The tokens [B, S] with those that are real first, as GroupQueryAttention wants them; and for
    each that came its place among all [B * S]. Padding goes anywhere: nobody looks at it.

    Of a prefill the mask's first S entries tell what is real. After it S is 1, where there is
    nothing to move, or the batch is, without padding. All by operators that leave nothing on the
    host, for CUDA graphs.
    """
    count = g.node("Shape", [ids], start=1, end=2)
    real = g.node("Slice", [mask, g.constant([0]), count, g.constant([1])], name="real")
    ranks = g.node("CumSum", [real, g.constant(1)])
    slots = g.node("Sub", [g.node("Mul", [ranks, real]), g.constant(1)], name="slots")
    moved = g.node("ScatterElements", [ids, slots, ids], axis=1, name="padded_on_the_right")
    ones = g.node("Cast", [g.node("Equal", [ids, ids])], to=INT64)
    each = g.node("ReduceSum", [ones, g.constant([1])], keepdims=1)
    before = g.node("CumSum", [each, g.constant(0)], exclusive=1)
    within = g.node("Max", [slots, g.constant(0)])
    return moved, g.node("Add", [within, before], name="places")


def _add_norm(
    g: GraphBuilder, residual: str, added: str, weight: str, eps: float, name: str
) -> tuple[str, str]:
    outputs = [name, "", "", f"{name}.sum"]
    g.node(
        "SkipSimplifiedLayerNormalization",
        [residual, added, weight],
        name=name,
        outputs=outputs,
        domain="com.microsoft",
        epsilon=eps,
    )
    return outputs[0], outputs[3]


def _attend(g: GraphBuilder, layer: Layer, shared: Shared, q: str, k: str, v: str) -> str:
    turns = layer.rope is not None
    rotary = rotary_of(g, layer, shared) if turns else ()
    said: dict[str, Any] = {}
    if layer.scale != layer.shape.head_dim**-0.5:
        said["scale"] = layer.scale
    if layer.cap is not None:
        said["softcap"] = layer.cap
    context: list[str] = g.node(
        "GroupQueryAttention",
        [q, k, v, *layer.past, shared.lengths, shared.total, *rotary],
        name=f"attention.{layer.index}",
        outputs=[f"attention.{layer.index}", *layer.present],
        domain="com.microsoft",
        num_heads=layer.shape.heads,
        kv_num_heads=layer.shape.kv_heads,
        do_rotary=int(turns),
        rotary_interleaved=int(layer.interleaved),
        local_window_size=layer.shape.sliding_window or -1,
        **said,
    )
    return context[0]


FUSED = Operators(
    opset=23,
    packed_qkv=True,
    inputs=_inputs,
    norm=rms_normalization,
    add_norm=_add_norm,
    rotate=rotary_embedding,
    attend=_attend,
    gelu=gelu,
)
