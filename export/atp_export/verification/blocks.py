"""Matrices that a graph holds in blocks of integer levels: what its operators' attributes say.

Formulas: com.microsoft MatMulNBits and GatherBlockQuantized (ONNX Runtime's ContribOperators.md),
ai.onnx DequantizeLinear (opset 21, blocked). Written from those, not from what the exporter does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atp_export.verification.tensors import widened

Levels = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix [N, K] in blocks along K: (level - zero) * scale.

    levels [N, blocks * block], of which the first K are the matrix's; zeros, scales [N, blocks];
    lowest, highest: the ends of the levels' range.
    """

    levels: Levels
    zeros: Levels
    scales: NDArray[np.float32]
    columns: int
    block: int
    lowest: int
    highest: int

    @property
    def bits(self) -> int:
        return (self.highest - self.lowest).bit_length()

    def rows(self, part: slice) -> Quantized:
        """Some of the N rows."""
        return replace(
            self, levels=self.levels[part], zeros=self.zeros[part], scales=self.scales[part]
        )

    def values(self) -> NDArray[np.float32]:
        """The weights [N, K] in fp32."""
        by_block = self.levels.reshape(*self.scales.shape, self.block).astype(np.float32)
        by_block -= self.zeros[:, :, None].astype(np.float32)
        by_block *= self.scales[:, :, None]
        return by_block.reshape(len(self.levels), -1)[:, : self.columns]

    def steps(self, difference: NDArray[np.float32]) -> NDArray[np.float32]:
        """Differences of weights [N, K] as shares of their blocks' scales."""
        scales = np.repeat(np.abs(self.scales), self.block, axis=1)[:, : self.columns]
        # Of a block of zeros the scale may be 0: it may not differ at all.
        none = np.where(difference == 0, np.float32(0), np.float32(np.inf))
        return np.divide(np.abs(difference), scales, out=none, where=scales > 0)

    def at_the_end(self) -> NDArray[np.bool_]:
        """Which weights [N, K] lie at an end of the range, where they may have been cut off."""
        levels = self.levels[:, : self.columns]
        return (levels == self.lowest) | (levels == self.highest)


def of_matmul_nbits(
    attributes: Mapping[str, Any],
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
) -> Quantized:
    """B of com.microsoft MatMulNBits. Raises ValueError where its attributes contradict B."""
    bits, block = attributes.get("bits", 4), attributes["block_size"]
    rows, columns = attributes["N"], attributes["K"]
    count = -(-columns // block)
    expected = (rows, count, block * bits // 8)
    if packed.shape != expected or scales.size != rows * count:
        raise ValueError(
            f"MatMulNBits says N {rows}, K {columns}, {bits} bits, blocks of {block}: its weights "
            f"would be {expected}, and are {packed.shape} with {scales.size} scales"
        )
    levels = _unpacked(packed.reshape(rows, -1), bits)
    return _unsigned(levels, scales.reshape(rows, count), zeros, bits, block, columns)


def of_gather_block_quantized(
    attributes: Mapping[str, Any],
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
) -> Quantized:
    """The table [V, H] of com.microsoft GatherBlockQuantized, in bytes. Raises ValueError for
    other axes than its rows, and where its attributes contradict the table."""
    bits, block = attributes.get("bits", 4), attributes.get("block_size", 128)
    axes = (attributes.get("gather_axis", 0), attributes.get("quantize_axis", 1) % 2)
    levels = _unpacked(packed, bits) if packed.ndim == 2 and packed.dtype == np.uint8 else None
    if (
        levels is None
        or axes != (0, 1)
        or scales.shape != (len(levels), -(-levels.shape[1] // block))
    ):
        raise ValueError(
            f"GatherBlockQuantized with axes {axes}, {bits} bits and blocks of {block} does not "
            f"read rows of bytes {packed.shape} {packed.dtype} with scales {scales.shape}"
        )
    return _unsigned(_padded(levels, block), scales, zeros, bits, block, levels.shape[1])


def of_dequantize_linear(
    attributes: Mapping[str, Any],
    values: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
) -> tuple[Quantized, bool]:
    """A matrix of ai.onnx DequantizeLinear, and whether its blocks lie along its first axis (it is
    then returned transposed). Raises ValueError where its attributes contradict it."""
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    turned = values.ndim == 2 and axis % 2 == 0
    if turned:
        values, scales, zeros = values.T, scales.T, None if zeros is None else zeros.T
    if values.ndim != 2 or not block or scales.shape != (len(values), -(-values.shape[1] // block)):
        raise ValueError(
            f"DequantizeLinear along axis {axis} in blocks of {block} does not read "
            f"{values.shape} with scales {scales.shape}"
        )
    bits, signed = (4 if "int4" in values.dtype.name else 8), values.dtype.name.startswith("int")
    lowest = -(2 ** (bits - 1)) if signed else 0
    return Quantized(
        levels=_padded(values.astype(np.int8 if signed else np.uint8), block),
        zeros=np.zeros(scales.shape, np.int8) if zeros is None else zeros,
        scales=widened(scales),
        columns=values.shape[1],
        block=block,
        lowest=lowest,
        highest=lowest + 2**bits - 1,
    ), turned


def _unsigned(
    levels: Levels,
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    bits: int,
    block: int,
    columns: int,
) -> Quantized:
    """Unsigned levels; zeros are packed like them, or None for the middle of their range."""
    middle = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    if zeros is not None:
        packed = zeros.reshape(len(levels), -1)
        middle = _unpacked(packed, bits)[:, : scales.shape[1]]
    if middle.shape != scales.shape:
        raise ValueError(f"zero points {middle.shape} beside scales {scales.shape}")
    return Quantized(
        levels=levels,
        zeros=middle,
        scales=widened(scales),
        columns=columns,
        block=block,
        lowest=0,
        highest=2**bits - 1,
    )


def _padded(levels: Levels, block: int) -> Levels:
    """Levels [N, K] up to whole blocks."""
    return np.pad(levels, ((0, 0), (0, -levels.shape[1] % block)))


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Levels along the last axis of bytes [N, n], the lowest bits first."""
    if bits not in (2, 4, 8) or packed.dtype != np.uint8:
        raise ValueError(f"levels of {bits} bits in {packed.dtype}: expected 2, 4 or 8 in uint8")
    count = 8 // bits
    levels = np.empty((len(packed), packed.shape[1] * count), np.uint8)
    for i in range(count):
        levels[:, i::count] = (packed >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
    return levels
