"""Block-wise int8 and int4 weights, one matrix at a time, by onnxruntime's own quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from torch import Tensor

BLOCK = 32
Bits = Literal[4, 8]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A matrix [K, N] in symmetric blocks of 32 along K; the last block is padded with zeros.

    packed: [N, blocks, 32 * bits / 8] unsigned with their middle (8 or 128) as zero, as
    com.microsoft MatMulNBits reads them; scales: [N, blocks] fp32.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: Bits
    rows: int

    def transposed(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The same numbers as ai.onnx DequantizeLinear reads them, blocks along axis 0: signed
        values [padded K, N] (as bytes; two int4 a byte, the first one low), scales [blocks, N]."""
        columns = self.packed.shape[0]
        flat, scales = self.packed.reshape(columns, -1), np.ascontiguousarray(self.scales.T)
        if self.bits == 8:
            return np.ascontiguousarray(flat.T) ^ np.uint8(0x80), scales
        nibbles = np.stack([flat & np.uint8(0xF), flat >> np.uint8(4)], axis=-1)
        # The padded K is even, hence the count of values too.
        values = nibbles.reshape(columns, -1).T.reshape(-1) ^ np.uint8(0x8)
        return values[0::2] | (values[1::2] << np.uint8(4)), scales


def quantize(matrix: Tensor, bits: Bits) -> Blocks:
    """Round a matrix [K, N] to the nearest of 2^bits levels a block (no calibration data)."""
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    weight = np.ascontiguousarray(matrix.float().numpy())
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    return Blocks(packed=packed, scales=scales, bits=bits, rows=matrix.shape[0])
