"""A decoder as an ONNX graph, in two flavours from one description.

- `ort`: com.microsoft operators of ONNX Runtime: GroupQueryAttention with rotary inside, its KV
  cache shared in place, packed qkv, residual additions fused with the norms. Positions follow from
  the attention mask, which must be 1s and then 0s (right padding); `position_ids` is no input.
- `standard`: ai.onnx operators of opset 23 alone (Attention, RotaryEmbedding, RMSNormalization),
  with `position_ids` and any padding.

Every layer takes its own widths from the model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from atp_edge.families import LayerShape, ModelShape
from atp_export.graph.builder import ONNX_TYPES, GraphBuilder

Flavour = Literal["ort", "standard"]
OPSET = 23
_MASKED = -1e9
_INT64, _FLOAT = 7, 1


class Weights(Protocol):
    """Tensors of a checkpoint by name, read when asked for."""

    def __call__(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Tables of the rotary embedding, [positions, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """Names that all layers read."""

    cos: str
    sin: str
    positions: str
    mask: str
    lengths: str
    total: str


def build_decoder(
    g: GraphBuilder,
    shape: ModelShape,
    weights: Weights,
    rotary: Rotary,
    flavour: Flavour,
    *,
    tie_head: bool,
) -> None:
    """Add the whole decoder to a graph. tie_head: the vocabulary projection reads the embedding's
    tensor (one copy in the file); otherwise it gets a [hidden, vocabulary] matrix of its own."""
    g.output("logits", _FLOAT, ["batch_size", "sequence_length", shape.vocabulary])
    ids = g.input("input_ids", _INT64, ["batch_size", "sequence_length"])
    attention_mask = g.input("attention_mask", _INT64, ["batch_size", "total_sequence_length"])
    shared = (_ort_inputs if flavour == "ort" else _standard_inputs)(g, ids, attention_mask, rotary)
    table = g.weight("model.embed_tokens.weight", weights("model.embed_tokens.weight"))
    residual = g.node("Gather", [table, ids], name="embed")
    added: str | None = None
    for i, layer in enumerate(shape.layers):
        at = f"model.layers.{i}"
        norm = g.weight(f"{at}.input_layernorm.weight", weights(f"{at}.input_layernorm.weight"))
        hidden, residual = _norm(g, shape, flavour, residual, added, norm, f"{at}.input_norm")
        added = _attention(g, shape, layer, weights, flavour, shared, hidden, i)
        name = f"{at}.post_attention_layernorm.weight"
        hidden, residual = _norm(
            g, shape, flavour, residual, added, g.weight(name, weights(name)), f"{at}.mlp_norm"
        )
        added = _mlp(g, shape, weights, hidden, i)
    norm = g.weight("model.norm.weight", weights("model.norm.weight"))
    hidden, _ = _norm(g, shape, flavour, residual, added, norm, "final_norm")
    _head(g, shape, weights, hidden, table, tie_head)


def _ort_inputs(g: GraphBuilder, ids: str, mask: str, rotary: Rotary) -> _Shared:
    """Lengths of GroupQueryAttention: seqlens_k = tokens - 1 a row, and the longest total."""
    tokens = g.node("ReduceSum", [mask, g.constant([1])], keepdims=0)
    lengths = g.node("Sub", [tokens, g.constant([1])])
    total = g.node("Gather", [g.node("Shape", [mask]), g.constant(1)], axis=0)
    return _Shared(
        cos=g.weight("rotary.cos", rotary.cos),
        sin=g.weight("rotary.sin", rotary.sin),
        positions="",
        mask="",
        lengths=g.node("Cast", [lengths], to=6),
        total=g.node("Cast", [total], to=6),
    )


def _standard_inputs(g: GraphBuilder, ids: str, mask: str, rotary: Rotary) -> _Shared:
    """An additive mask [B, 1, S, T]: causal, and nothing where the attention mask is 0."""
    positions = g.input("position_ids", _INT64, ["batch_size", "sequence_length"])
    length = g.node("Gather", [g.node("Shape", [ids]), g.constant(1)], axis=0)
    total = g.node("Gather", [g.node("Shape", [mask]), g.constant(1)], axis=0)
    zero, one = g.constant(0), g.constant(1)
    keys = g.node("Range", [zero, total, one])
    queries = g.node("Range", [g.node("Sub", [total, length]), total, one])
    causal = g.node("LessOrEqual", [keys, g.node("Unsqueeze", [queries, g.constant([1])])])
    real = g.node("Unsqueeze", [g.node("Cast", [mask], to=9), g.constant([1, 2])])
    allowed = g.node("And", [causal, real])
    nothing = g.weight("mask.none", torch.tensor(0.0))
    # Finite: a row of padding that may see nothing would otherwise be a softmax over nothing.
    masked = g.weight("mask.masked", torch.tensor(max(_MASKED, torch.finfo(g.dtype).min / 2)))
    return _Shared(
        cos=g.weight("rotary.cos", rotary.cos),
        sin=g.weight("rotary.sin", rotary.sin),
        positions=positions,
        mask=g.node("Where", [allowed, nothing, masked]),
        lengths="",
        total="",
    )


def _norm(
    g: GraphBuilder,
    shape: ModelShape,
    flavour: Flavour,
    residual: str,
    added: str | None,
    weight: str,
    name: str,
) -> tuple[str, str]:
    """RMS norm of residual + added: (normalized, the sum)."""
    if flavour == "ort" and added is not None:
        outputs = [name, "", "", f"{name}.sum"]
        g.node(
            "SkipSimplifiedLayerNormalization",
            [residual, added, weight],
            name=name,
            outputs=outputs,
            domain="com.microsoft",
            epsilon=shape.norm_eps,
        )
        return outputs[0], outputs[3]
    if added is not None:
        residual = g.node("Add", [residual, added], name=f"{name}.sum")
    return _rms(g, shape, residual, weight, name), residual


def _rms(g: GraphBuilder, shape: ModelShape, x: str, weight: str, name: str) -> str:
    # Not ONNX Runtime's SimplifiedLayerNormalization: onnx.checker refuses it.
    out: str = g.node("RMSNormalization", [x, weight], name=name, axis=-1, epsilon=shape.norm_eps)
    return out


def _linear(
    g: GraphBuilder, shape: ModelShape, weights: Weights, x: str, at: str, projections: list[str]
) -> str:
    """Projections of one input as one matrix [in, sum of out], with their biases if any."""
    matrix = torch.cat([weights(f"{at}.{p}.weight") for p in projections]).T
    label = f"{at}.{'_'.join(p.removesuffix('_proj') for p in projections)}"
    y: str = g.node("MatMul", [x, g.weight(f"{label}.weight", matrix)], name=label)
    if shape.biased.isdisjoint(projections):
        return y
    rows = [weights(f"{at}.{p}.weight").shape[0] for p in projections]
    bias = torch.cat(
        [
            weights(f"{at}.{p}.bias") if p in shape.biased else torch.zeros(n)
            for p, n in zip(projections, rows, strict=True)
        ]
    )
    biased: str = g.node("Add", [y, g.weight(f"{label}.bias", bias)], name=f"{label}.biased")
    return biased


def _attention(
    g: GraphBuilder,
    shape: ModelShape,
    layer: LayerShape,
    weights: Weights,
    flavour: Flavour,
    shared: _Shared,
    hidden: str,
    index: int,
) -> str:
    at = f"model.layers.{index}.self_attn"
    past = _cache(g, layer, index)
    qkv = _linear(g, shape, weights, hidden, at, ["q_proj", "k_proj", "v_proj"])
    if flavour == "ort" and not shape.qk_norm:
        q, k, v = qkv, "", ""
    else:
        q, k, v = _split(g, layer, qkv, at)
    if shape.qk_norm:
        q = _head_norm(g, shape, layer, weights, q, f"{at}.q_norm")
        k = _head_norm(g, shape, layer, weights, k, f"{at}.k_norm")
    attend = _group_query_attention if flavour == "ort" else _standard_attention
    context = attend(g, layer, shared, (q, k, v), past, index)
    return _linear(g, shape, weights, context, at, ["o_proj"])


def _cache(g: GraphBuilder, layer: LayerShape, index: int) -> tuple[str, str]:
    kind = ONNX_TYPES[g.dtype]
    names = []
    for what in ("key", "value"):
        names.append(
            g.input(
                f"past_key_values.{index}.{what}",
                kind,
                ["batch_size", layer.kv_heads, "past_sequence_length", layer.head_dim],
            )
        )
        g.output(
            f"present.{index}.{what}",
            kind,
            ["batch_size", layer.kv_heads, "total_sequence_length", layer.head_dim],
        )
    return names[0], names[1]


def _split(g: GraphBuilder, layer: LayerShape, qkv: str, at: str) -> list[str]:
    sizes = [layer.heads * layer.head_dim] + [layer.kv_heads * layer.head_dim] * 2
    parts: list[str] = g.node(
        "Split", [qkv, g.constant(sizes)], name=f"{at}.split", outputs=3, axis=-1
    )
    return parts


def _head_norm(
    g: GraphBuilder,
    shape: ModelShape,
    layer: LayerShape,
    weights: Weights,
    x: str,
    name: str,
) -> str:
    """RMS norm over each head (Qwen3), as nodes of its own: the CPU kernel takes none inside."""
    heads = g.node("Reshape", [x, g.constant([0, 0, -1, layer.head_dim])])
    weight = g.weight(f"{name}.weight", weights(f"{name}.weight"))
    normed = _rms(g, shape, heads, weight, name)
    flat: str = g.node("Reshape", [normed, g.constant([0, 0, -1])])
    return flat


def _group_query_attention(
    g: GraphBuilder,
    layer: LayerShape,
    shared: _Shared,
    qkv: tuple[str, str, str],
    past: tuple[str, str],
    index: int,
) -> str:
    context: list[str] = g.node(
        "GroupQueryAttention",
        [*qkv, *past, shared.lengths, shared.total, shared.cos, shared.sin],
        name=f"attention.{index}",
        outputs=[f"attention.{index}", f"present.{index}.key", f"present.{index}.value"],
        domain="com.microsoft",
        num_heads=layer.heads,
        kv_num_heads=layer.kv_heads,
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=layer.sliding_window or -1,
    )
    return context[0]


def _standard_attention(
    g: GraphBuilder,
    layer: LayerShape,
    shared: _Shared,
    qkv: tuple[str, str, str],
    past: tuple[str, str],
    index: int,
) -> str:
    if layer.sliding_window is not None:
        raise ValueError(
            f"layer {index} attends to a window of {layer.sliding_window} tokens, which the "
            "standard flavour does not write; export with --export-flavour ort"
        )
    q, k, v = qkv
    q, k = (
        g.node(
            "RotaryEmbedding",
            [x, shared.cos, shared.sin, shared.positions],
            name=f"rotary.{index}.{what}",
            num_heads=heads,
        )
        for x, what, heads in ((q, "q", layer.heads), (k, "k", layer.kv_heads))
    )
    context: list[str] = g.node(
        "Attention",
        [q, k, v, shared.mask, *past],
        name=f"attention.{index}",
        outputs=[f"attention.{index}", f"present.{index}.key", f"present.{index}.value"],
        q_num_heads=layer.heads,
        kv_num_heads=layer.kv_heads,
    )
    return context[0]


def _mlp(g: GraphBuilder, shape: ModelShape, weights: Weights, hidden: str, index: int) -> str:
    at = f"model.layers.{index}.mlp"
    gate = _linear(g, shape, weights, hidden, at, ["gate_proj"])
    up = _linear(g, shape, weights, hidden, at, ["up_proj"])
    # ONNX Runtime fuses x * sigmoid(x).
    silu = g.node("Mul", [gate, g.node("Sigmoid", [gate])])
    return _linear(g, shape, weights, g.node("Mul", [silu, up]), at, ["down_proj"])


def _head(
    g: GraphBuilder, shape: ModelShape, weights: Weights, hidden: str, table: str, tie_head: bool
) -> None:
    if tie_head:
        flat = g.node("Reshape", [hidden, g.constant([-1, shape.hidden])])
        scores = g.node("Gemm", [flat, table], transB=1)
        batch = g.node("Shape", ["input_ids"])
        dims = g.node("Concat", [batch, g.constant([shape.vocabulary])], axis=0)
        logits = g.node("Reshape", [scores, dims])
    else:
        name = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
        matrix = g.weight("lm_head.matrix", weights(name).T)
        logits = g.node("MatMul", [hidden, matrix], name="lm_head")
    # Logits are fp32 whatever the weights are: samplers and JavaScript expect it.
    g.node("Cast", [logits], name="cast_logits", outputs=["logits"], to=_FLOAT)
