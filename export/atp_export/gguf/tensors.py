"""The weights of a decoder, one at a time, in a type that llama.cpp computes with.

- f32, f16: matrices in that type; norms and biases stay fp32.
- q8_0: blocks of 32, to the nearest.
- q4_0: gptq's 4-bit levels in blocks of 32. Embedding and head are q8_0, as llama-quantize has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from atp_export.gguf.places import TOP, Place
from atp_export.gguf.rope import Angles

GgufPrecision = Literal["f32", "f16", "q8_0", "q4_0"]
BLOCK = 32
FREQUENCIES = "rope_freqs.weight"


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
    places: Sequence[Place],
    angles: Angles,
    precision: GgufPrecision,
) -> Iterator[Info]:
    """Every tensor of the file, in its order."""
    for place in places:
        size = place.size(tuple(weights(place.source).shape))
        yield Info(name=place.target, kind=_kind(place.source, size, precision), shape=size)
    if angles.factors is not None:
        yield Info(name=FREQUENCIES, kind=Kind.F32, shape=angles.factors.shape)


def stored_tensors(
    weights: Callable[[str], Tensor],
    places: Sequence[Place],
    angles: Angles,
    precision: GgufPrecision,
    rounder: Rounder,
) -> Iterator[NDArray[Any]]:
    """The bytes of every tensor of `tensor_infos`, read when its turn comes."""
    for place in places:
        tensor = place.stored(weights(place.source).to(torch.float32))
        kind = _kind(place.source, tuple(tensor.shape), precision)
        yield _stored(place.source, tensor, kind, rounder)
    if angles.factors is not None:
        yield angles.factors


def _kind(name: str, shape: tuple[int, ...], precision: GgufPrecision) -> Kind:
    if len(shape) == 1 or precision == "f32":
        return Kind.F32
    if precision == "f16" or shape[1] % BLOCK:
        return Kind.F16  # A row that no whole number of blocks makes stays f16.
    return Kind.Q8_0 if precision == "q8_0" or name in TOP else Kind.Q4_0


def _stored(name: str, tensor: Tensor, kind: Kind, rounder: Rounder) -> NDArray[Any]:
    if kind == Kind.Q4_0:
        return packed_q4(*rounder(name.removesuffix(".weight"), tensor))
    values: NDArray[np.float32] = tensor.contiguous().numpy()
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
