"""Block-wise int8 and int4 weights, one matrix at a time.

How values are rounded is the quantizer's:

- nearest: to the nearest of the block's levels, by onnxruntime's own quantizer; no data.
- k-quant: levels that fit the block's weights best, with a zero point a block (llama.cpp's search,
  as onnxruntime ships it); no data, 3 % more bytes at 4 bits.
- gptq: errors of a weight made good by those after it, so that the loss on calibration text changes
  least (see atp_export.quantization.gptq, atp_export.quantization.calibrate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from torch import Tensor

from atp_edge.config import Quantizer
from atp_edge.model.storage import BLOCK, Bits
from atp_export.quantization.gptq import COLUMNS, gptq


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A matrix [K, N] in blocks of 32 along K; the last block is padded.

    packed: [N, blocks, 32 * bits / 8] unsigned, as com.microsoft MatMulNBits reads them; scales:
    [N, blocks] fp32; zeros: the level that means 0 of every block, [N, blocks * bits / 8 rounded
    up], packed alike, or None where it is the middle (8 or 128).
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None = None
    bits: Bits
    rows: int

    def arrays(self, *, fused: bool) -> list[NDArray[Any]]:
        """Levels, scales and, where there are any, zero points, as the tensors of `Storage.matrix`
        hold them."""
        if fused:
            levels, scales, zeros = self.packed, self.scales, self.zeros
        else:
            (levels, scales), zeros = self.transposed(), self.transposed_zeros()
        return [levels, scales] if zeros is None else [levels, scales, zeros]

    def transposed(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The same numbers as ai.onnx DequantizeLinear reads them, blocks along axis 0: signed
        values [padded K, N] (as bytes; two int4 a byte, the first one low), scales [blocks, N]."""
        levels = _unpacked(self.packed.reshape(len(self.packed), -1), self.bits)
        return _signed_transpose(levels, self.bits), np.ascontiguousarray(self.scales.T)

    def transposed_zeros(self) -> NDArray[np.uint8] | None:
        """The zero points beside `transposed`, [blocks, N], signed and packed as its values."""
        if self.zeros is None:
            return None
        blocks = self.scales.shape[1]
        return _signed_transpose(_unpacked(self.zeros, self.bits)[:, :blocks], self.bits)


def quantize(
    matrix: Tensor, bits: Bits, quantizer: Quantizer = "nearest", gram: Tensor | None = None
) -> QuantizedMatrix:
    """Round a matrix [K, N] to 2^bits levels a block.

    gram: X^T X [K, K] of the matrix's calibration inputs X, its rows weighted or not, for gptq; a
    matrix without one is rounded to the nearest.
    """
    if quantizer == "k-quant":
        found = [_k_quant(columns, bits) for columns in matrix.split(COLUMNS, dim=1)]
        return _beside_each_other(found)
    if quantizer == "gptq" and gram is not None:
        levels, scales = gptq(matrix, gram, bits=bits, block=BLOCK)
        middle = 2 ** (bits - 1)
        blocks, columns = scales.shape
        padded = torch.full((blocks * BLOCK, columns), middle, dtype=torch.uint8)
        padded[: len(levels)] = levels
        return QuantizedMatrix(
            packed=_packed(padded.T.numpy(), bits).reshape(columns, blocks, -1),
            scales=np.ascontiguousarray(scales.T.numpy()),
            bits=bits,
            rows=len(matrix),
        )
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer_of_columns = DefaultWeightOnlyQuantizer(config)
    rounded = []
    for columns in matrix.split(COLUMNS, dim=1):  # A vocabulary's are gigabytes in fp32.
        weight = np.ascontiguousarray(columns.float().numpy())
        rounded.append(quantizer_of_columns.qbits_block_quant(weight)[:2])
    packed, scales_found = (np.concatenate(of) for of in zip(*rounded, strict=True))
    return QuantizedMatrix(packed=packed, scales=scales_found, bits=bits, rows=len(matrix))


def _beside_each_other(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of the same rows as one."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedMatrix(
        packed=np.concatenate([part.packed for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zeros=np.concatenate(zeros) if zeros else None,
        bits=parts[0].bits,
        rows=parts[0].rows,
    )


def _k_quant(matrix: Tensor, bits: Bits) -> QuantizedMatrix:
    rows, columns = matrix.shape
    blocks = -(-rows // BLOCK)
    weight = np.zeros((columns, blocks * BLOCK), np.float32)
    weight[:, :rows] = matrix.T.float().numpy()
    # A block of equal weights divides by 0 in its search, and keeps its first fit.
    with np.errstate(divide="ignore", invalid="ignore"):
        levels, scales, zeros = quant_tensor_k_quant_cpu(weight, bits, BLOCK)
    levels = levels.astype(np.uint8).reshape(columns, -1)
    return QuantizedMatrix(
        packed=_packed(levels, bits).reshape(columns, blocks, -1),
        scales=scales.astype(np.float32).reshape(columns, blocks),
        zeros=_packed(zeros.reshape(columns, blocks), bits),
        bits=bits,
        rows=rows,
    )


def _packed(levels: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Levels [N, n] along the last axis: two 4-bit levels a byte, the first one low."""
    if bits == 8:
        return np.ascontiguousarray(levels)
    even = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << np.uint8(4))


def _unpacked(packed: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """The inverse of `_packed` (an even number of 4-bit levels)."""
    if bits == 8:
        return packed
    nibbles = np.stack([packed & np.uint8(0xF), packed >> np.uint8(4)], axis=-1)
    return nibbles.reshape(len(packed), -1)


def _signed_transpose(levels: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Levels [N, n] -> the bytes of signed values [n, N], row-major across rows."""
    flat = levels.T.reshape(-1)
    if bits == 8:
        return flat ^ np.uint8(0x80)
    return _packed((flat ^ np.uint8(0x8))[None], bits)[0]
