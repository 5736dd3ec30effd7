"""The weights of a decoder under llama.cpp's names, one at a time, in a type that it computes with.

- f32, f16: matrices in that type; norms and biases stay fp32.
- q8_0: blocks of 32, to the nearest.
- q4: our quantizers' 4-bit levels (gptq by default) in blocks of 32: Q4_0 where the middle level
  means 0, Q4_1 where every block has a zero point. The embedding is q8_0, as llama-quantize has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray
from torch import Tensor

from atp_edge.model.families import ModelShape
from atp_export.gguf.architecture import Architecture

GgufPrecision = Literal["f32", "f16", "q8_0", "q4"]
BLOCK = 32
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as the file has it. raw: its bytes; shape: in values, rows first."""

    name: str
    kind: Kind
    raw: NDArray[Any]


# (name of the module, matrix [N, K]) -> levels uint8 [N, K], scales [N, K / 32], zeros or None
Rounder = Callable[[str, Tensor], tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]]


def stored_tensors(
    weights: Callable[[str], Tensor],
    shape: ModelShape,
    named: Architecture,
    precision: GgufPrecision,
    rounder: Rounder,
    rope: Mapping[str, Any],
) -> Iterator[Stored]:
    """Every tensor of the file, read when its turn comes."""
    for name, target in _names(shape):
        tensor = _reordered(name, weights(name), shape, named)
        yield _stored(name, target, tensor, precision, rounder)
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(rope, shape.layers[0].head_dim)
        yield Stored(name="rope_freqs.weight", kind=Kind.F32, raw=factors)


def _names(shape: ModelShape) -> Iterator[tuple[str, str]]:
    """(name in the checkpoint, name in the file)."""
    for name, target in TOP_NAMES.items():
        if not (shape.tied and name == "lm_head.weight"):
            yield name, target
    for i in range(len(shape.layers)):
        for module, target in LAYER_NAMES.items():
            own = module.rpartition(".")[2]
            if own in ("q_norm", "k_norm") and not shape.qk_norm:
                continue
            for kind in ("weight", *(["bias"] if own in shape.biased else [])):
                yield f"model.layers.{i}.{module}.{kind}", f"blk.{i}.{target}.{kind}"


def _reordered(name: str, tensor: Tensor, shape: ModelShape, named: Architecture) -> Tensor:
    """Rows of q and k for RoPE on neighbouring values: (0, d/2, 1, d/2 + 1, ...) of every head."""
    parts = name.split(".")
    if not named.paired_rope or "layers" not in parts:
        return tensor
    layer = shape.layers[int(parts[2])]
    heads = {"q_proj": layer.heads, "k_proj": layer.kv_heads}.get(parts[-2])
    if heads is None:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _stored(
    name: str, target: str, tensor: Tensor, precision: GgufPrecision, rounder: Rounder
) -> Stored:
    if tensor.ndim == 1 or precision == "f32":
        return Stored(name=target, kind=Kind.F32, raw=_floats(tensor))
    if precision == "f16" or tensor.shape[1] % BLOCK:
        # A row that no whole number of blocks makes stays f16.
        return Stored(name=target, kind=Kind.F16, raw=_floats(tensor).astype(np.float16))
    if precision == "q8_0" or name in TOP_NAMES:
        raw = quants.quantize(_floats(tensor), Kind.Q8_0)
        return Stored(name=target, kind=Kind.Q8_0, raw=raw)
    levels, scales, zeros = rounder(name.removesuffix(".weight"), tensor)
    kind = Kind.Q4_0 if zeros is None else Kind.Q4_1
    return Stored(name=target, kind=kind, raw=packed_q4(levels, scales, zeros))


def packed_q4(
    levels: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | None
) -> NDArray[np.uint8]:
    """Levels [N, K] and scales [N, K / 32] as rows of Q4_0 blocks (fp16 scale, 16 bytes), or of
    Q4_1 blocks (fp16 scale and fp16 value of level 0, 16 bytes). (ggml, ggml-common.h.)

    A byte holds the values i and i + 16 of its block, the first one low.
    """
    rows = len(levels)
    blocks = levels.astype(np.uint8).reshape(rows, -1, 2, BLOCK // 2)
    nibbles = blocks[:, :, 0] | (blocks[:, :, 1] << np.uint8(4))
    heads = [scales.astype(np.float16)]
    if zeros is not None:
        heads.append((-scales * zeros).astype(np.float16))
    bytes_of = [h[:, :, None].view(np.uint8) for h in heads]
    return np.concatenate([*bytes_of, nibbles], axis=2).reshape(rows, -1)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What llama.cpp divides each pair's frequency by, [head_dim / 2]
    (transformers.modeling_rope_utils, _compute_llama3_parameters)."""
    base, factor = rope["rope_theta"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    whole = np.where(
        waves < original / high, 1.0, np.where(waves > original / low, factor, between)
    )
    return whole.astype(np.float32)


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.to(torch.float32).contiguous().numpy()
    return array
