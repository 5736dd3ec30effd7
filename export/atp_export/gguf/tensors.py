"""The weights of a decoder under llama.cpp's names, one at a time, in a type that it computes with.

- f32, f16: matrices in that type; norms and biases stay fp32.
- q8_0: blocks of 32, to the nearest.
- q4_0: gptq's 4-bit levels in blocks of 32. Embedding and head are q8_0, as llama-quantize has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from atp_edge.model.families import ModelShape
from atp_export.gguf.architecture import Architecture

GgufPrecision = Literal["f32", "f16", "q8_0", "q4_0"]
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
class Info:
    """One tensor as the file's header has it. shape: in values, rows first."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


# (name of the module, matrix [N, K]) -> levels uint8 [N, K], scales [N, K / 32]
Rounder = Callable[[str, Tensor], tuple[NDArray[Any], NDArray[Any]]]


def tensor_infos(
    weights: Callable[[str], Tensor],
    shape: ModelShape,
    precision: GgufPrecision,
    rope: Mapping[str, Any],
) -> Iterator[Info]:
    """Every tensor of the file, in its order."""
    for name, target in _names(shape):
        size = tuple(weights(name).shape)
        yield Info(name=target, kind=_kind(name, size, precision), shape=size)
    if rope["rope_type"] == "llama3":
        factors = (shape.layers[0].head_dim // 2,)
        yield Info(name="rope_freqs.weight", kind=Kind.F32, shape=factors)


def stored_tensors(
    weights: Callable[[str], Tensor],
    shape: ModelShape,
    named: Architecture,
    precision: GgufPrecision,
    rounder: Rounder,
    rope: Mapping[str, Any],
) -> Iterator[NDArray[Any]]:
    """The bytes of every tensor of `tensor_infos`, read when its turn comes."""
    for name, _ in _names(shape):
        tensor = weights(name)
        kind = _kind(name, tuple(tensor.shape), precision)
        yield _stored(name, _reordered(name, tensor, shape, named), kind, rounder)
    if rope["rope_type"] == "llama3":
        yield llama3_factors(rope, shape.layers[0].head_dim)


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


def checkpoint_tensors(
    shape: ModelShape, named: Architecture
) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(name in the checkpoint, name in the file, rows of the file in the checkpoint's order)."""
    for name, target in _names(shape):
        heads = _paired_heads(name, shape, named)
        yield name, target, partial(_swapped, heads=heads, back=True)


def _reordered(name: str, tensor: Tensor, shape: ModelShape, named: Architecture) -> Tensor:
    """Rows of q and k for RoPE on neighbouring values: (0, d/2, 1, d/2 + 1, ...) of every head."""
    return _swapped(tensor, _paired_heads(name, shape, named))


def _paired_heads(name: str, shape: ModelShape, named: Architecture) -> int | None:
    """How many heads a tensor's rows are, where their order differs; None: it does not."""
    parts = name.split(".")
    if not named.paired_rope or "layers" not in parts:
        return None
    layer = shape.layers[int(parts[2])]
    return {"q_proj": layer.heads, "k_proj": layer.kv_heads}.get(parts[-2])


def _swapped(tensor: Tensor, heads: int | None, *, back: bool = False) -> Tensor:
    """Halves of every head in turn; back: the halves one after the other again."""
    if heads is None:
        return tensor
    parts = tensor.unflatten(0, (heads, -1, 2) if back else (heads, 2, -1))
    return parts.swapaxes(1, 2).reshape(tensor.shape)


def _kind(name: str, shape: tuple[int, ...], precision: GgufPrecision) -> Kind:
    if len(shape) == 1 or precision == "f32":
        return Kind.F32
    if precision == "f16" or shape[1] % BLOCK:
        return Kind.F16  # A row that no whole number of blocks makes stays f16.
    return Kind.Q8_0 if precision == "q8_0" or name in TOP_NAMES else Kind.Q4_0


def _stored(name: str, tensor: Tensor, kind: Kind, rounder: Rounder) -> NDArray[Any]:
    if kind == Kind.Q4_0:
        return packed_q4(*rounder(name.removesuffix(".weight"), tensor))
    values: NDArray[np.float32] = tensor.to(torch.float32).contiguous().numpy()
    return values if kind == Kind.F32 else quants.quantize(values, kind)


def packed_q4(levels: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.uint8]:
    """Levels [N, K], 8 meaning 0, and scales [N, K / 32] as rows of Q4_0 blocks: an fp16 scale,
    then 16 bytes that hold the values i and i + 16 of the block, the first one low
    (ggml-common.h)."""
    rows = len(levels)
    blocks = levels.astype(np.uint8).reshape(rows, -1, 2, BLOCK // 2)
    nibbles = blocks[:, :, 0] | (blocks[:, :, 1] << np.uint8(4))
    heads = scales.astype(np.float16)[:, :, None].view(np.uint8)
    return np.concatenate([heads, nibbles], axis=2).reshape(rows, -1)


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
