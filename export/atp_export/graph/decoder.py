"""A decoder as an ONNX graph: one description, written with the operators of a flavour.

Every layer takes its own widths from the model's shape; a layer without heads or without channels
passes the residual on. Logits are computed from the position `logits_from` on, a constant 0 that
our runtime makes an input (see atp_export.runtime.logits_from).
"""

from __future__ import annotations

from typing import Literal

import torch

from atp_edge.model.families import LayerShape, ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.flavour import FLOAT, INT64, Operators, Rotary, Shared, cache_of
from atp_export.graph.flavour_onnx import PORTABLE, STANDARD
from atp_export.graph.flavour_ort import FUSED
from atp_export.graph.linear import Storage, Weights, embedding_and_head, linear
from atp_export.runtime.logits_from import LOGITS_FROM

Flavour = Literal["ort", "standard", "portable"]
OPERATORS: dict[Flavour, Operators] = {
    "ort": FUSED,
    "standard": STANDARD,
    "portable": PORTABLE,
}
_END = 2**31 - 1


def build_decoder(
    g: GraphBuilder,
    shape: ModelShape,
    weights: Weights,
    rotary: Rotary,
    flavour: Flavour,
    storage: Storage,
) -> None:
    """Add the whole decoder to a graph."""
    ops = OPERATORS[flavour]
    g.output("logits", FLOAT, ["batch_size", "logits_length", shape.vocabulary])
    ids = g.input("input_ids", INT64, ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
    shared = ops.inputs(g, shape, ids, mask, rotary)
    residual, head = embedding_and_head(g, storage, shape, weights, shared.tokens or ids)
    added: str | None = None
    caches = 0
    for i, layer in enumerate(shape.layers):
        at = f"model.layers.{i}"
        if layer.heads:
            name = f"{at}.input_layernorm.weight"
            norm = g.weight(name, weights(name))
            hidden, residual = _norm(g, shape, ops, residual, added, norm, f"{at}.input_norm")
            added = _attention(g, shape, ops, layer, weights, storage, shared, hidden, i, caches)
            caches += 1
        if layer.channels:
            name = f"{at}.post_attention_layernorm.weight"
            norm = g.weight(name, weights(name))
            hidden, residual = _norm(g, shape, ops, residual, added, norm, f"{at}.mlp_norm")
            added = _mlp(g, shape, weights, storage, hidden, i)
    norm = g.weight("model.norm.weight", weights("model.norm.weight"))
    hidden, _ = _norm(g, shape, ops, residual, added, norm, "final_norm")
    start = g.tensor(LOGITS_FROM, torch.zeros(1, dtype=torch.int64))
    from_start = [start, g.constant([_END]), g.constant([1])]
    wanted = g.node("Slice", [shared.places or hidden, *from_start], name="wanted")
    if shared.places:
        rows = g.node("Reshape", [hidden, g.constant([-1, shape.hidden])])
        wanted = g.node("Gather", [rows, wanted], name="as_they_came")
    # Logits are fp32 whatever the weights are: samplers and JavaScript expect it.
    g.node("Cast", [head(wanted)], name="cast_logits", outputs=["logits"], to=FLOAT)


def _norm(
    g: GraphBuilder,
    shape: ModelShape,
    ops: Operators,
    residual: str,
    added: str | None,
    weight: str,
    name: str,
) -> tuple[str, str]:
    """RMS norm of residual + added: (normalized, the sum)."""
    if added is None:
        return ops.norm(g, residual, weight, shape.norm_eps, name), residual
    return ops.add_norm(g, residual, added, weight, shape.norm_eps, name)


def _attention(
    g: GraphBuilder,
    shape: ModelShape,
    ops: Operators,
    layer: LayerShape,
    weights: Weights,
    storage: Storage,
    shared: Shared,
    hidden: str,
    index: int,
    cache: int,
) -> str:
    at = f"model.layers.{index}.self_attn"
    place = cache_of(g, layer, index, cache)
    q = linear(g, storage, shape, weights, hidden, at, ["q_proj", "k_proj", "v_proj"])
    k = v = ""
    if shape.qk_norm or not ops.packed_qkv:
        q, k, v = _split(g, layer, q, at)
    if shape.qk_norm:
        q = _head_norm(g, shape, ops, layer, weights, q, f"{at}.q_norm")
        k = _head_norm(g, shape, ops, layer, weights, k, f"{at}.k_norm")
    context = ops.attend(g, place, shared, q, k, v)
    return linear(g, storage, shape, weights, context, at, ["o_proj"])


def _split(g: GraphBuilder, layer: LayerShape, qkv: str, at: str) -> list[str]:
    sizes = [layer.heads * layer.head_dim] + [layer.kv_heads * layer.head_dim] * 2
    parts: list[str] = g.node(
        "Split", [qkv, g.constant(sizes)], name=f"{at}.split", outputs=3, axis=-1
    )
    return parts


def _head_norm(
    g: GraphBuilder,
    shape: ModelShape,
    ops: Operators,
    layer: LayerShape,
    weights: Weights,
    x: str,
    name: str,
) -> str:
    """RMS norm over each head (Qwen3), as nodes of its own: the CPU kernel takes none inside."""
    heads = g.node("Reshape", [x, g.constant([0, 0, -1, layer.head_dim])])
    weight = g.weight(f"{name}.weight", weights(f"{name}.weight"))
    normed = ops.norm(g, heads, weight, shape.norm_eps, name)
    flat: str = g.node("Reshape", [normed, g.constant([0, 0, -1])])
    return flat


def _mlp(
    g: GraphBuilder,
    shape: ModelShape,
    weights: Weights,
    storage: Storage,
    hidden: str,
    index: int,
) -> str:
    at = f"model.layers.{index}.mlp"
    # Not packed: no faster for one token (5.3 ms both ways at int4, 135M parameters, 2 cores), and
    # the prefill of 128 tokens takes 173 ms instead of 159.
    gate = linear(g, storage, shape, weights, hidden, at, ["gate_proj"])
    up = linear(g, storage, shape, weights, hidden, at, ["up_proj"])
    # ONNX Runtime fuses x * sigmoid(x).
    silu = g.node("Mul", [gate, g.node("Sigmoid", [gate])])
    return linear(g, storage, shape, weights, g.node("Mul", [silu, up]), at, ["down_proj"])
