"""Matrices of a decoder: projections with their biases and adapters.

How a matrix is stored follows from precision and flavour:

- fp32, fp16, bf16: MatMul with a [in, out] weight.
- int8, int4 with com.microsoft operators: MatMulNBits.
- int8, int4 with ai.onnx alone: blocked DequantizeLinear (opset 21) before a MatMul.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from onnx import TensorProto
from torch import Tensor

from atp_export.graph.builder import GraphBuilder
from atp_export.quantization.quantize import BLOCK, Bits, QuantizedMatrix, Quantizer, quantize

# int8 activations inside MatMulNBits: without them CPUs take a slow path (one token, 2048 x 4096,
# 2 x86 cores: 0.36 ms instead of 0.09 at 4 bits, 30 instead of 0.12 at 8).
_ACCURACY_LEVEL = 4


class Weights(Protocol):
    """Tensors of a checkpoint by name, read when asked for."""

    def __call__(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How matrices are written. bits None: in the graph's own type."""

    bits: Bits | None
    contrib: bool
    quantizer: Quantizer = "nearest"
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """Calibration for gptq, by the path of a packed matrix's first projection, or lm_head."""
    adapters: bool = False
    """Every projection takes LoRA factors as optional inputs, empty by default."""


class MatrixWriter:
    """Adds constant matrices and their products to a graph."""

    def __init__(
        self, g: GraphBuilder, storage: Storage, biased: frozenset[str], weights: Weights
    ) -> None:
        self.g, self.storage, self.biased, self.weights = g, storage, biased, weights

    def vector(self, name: str) -> str:
        """A vector of the checkpoint, under its own name."""
        return self.g.weight(name, self.weights(name))

    def linear(self, x: str, at: str, projections: Sequence[str]) -> str:
        """Projections of one input as one matrix [in, sum of out], with their biases if any."""
        parts = [self.weights(f"{at}.{p}.weight") for p in projections]
        label, matrix = linear_name(at, projections), torch.cat(parts).T
        y = self.matmul(x, matrix, label, self.storage.grams.get(f"{at}.{projections[0]}"))
        if not self.biased.isdisjoint(projections):
            biases = [
                self.weights(f"{at}.{p}.bias") if p in self.biased else torch.zeros(len(part))
                for p, part in zip(projections, parts, strict=True)
            ]
            bias = self.g.weight(f"{label}.bias", torch.cat(biases))
            y = self.g.node("Add", [y, bias], name=f"{label}.biased")
        return self._adapted(x, y, label, matrix) if self.storage.adapters else y

    def _adapted(self, x: str, y: str, label: str, matrix: Tensor) -> str:
        """y + (x A) B. A [in, r] and B [r, out] are inputs, of rank 0 without an adapter."""
        (rows, columns), rank = matrix.shape, f"{label}.rank"
        no_a, no_b = (torch.zeros(n, dtype=self.g.dtype) for n in ((rows, 0), (0, columns)))
        a = self.g.optional_input(f"{label}.lora_A", no_a, [rows, rank])
        b = self.g.optional_input(f"{label}.lora_B", no_b, [rank, columns])
        low = self.g.node("MatMul", [x, a], name=f"{label}.lora_low")
        change = self.g.node("MatMul", [low, b], name=f"{label}.lora")
        adapted: str = self.g.node("Add", [y, change], name=f"{label}.adapted")
        return adapted

    def matmul(self, x: str, matrix: Tensor, name: str, gram: Tensor | None = None) -> str:
        """x [.., K] times a matrix [K, N]; gram [K, K] of x on calibration text, for gptq."""
        if self.storage.bits is None:
            weight = self.g.weight(f"{name}.weight", matrix)
            y: str = self.g.node("MatMul", [x, weight], name=name)
            return y
        rounded = self.quantize(matrix, gram)
        if self.storage.contrib:
            return self.matmul_nbits(x, rounded, self.blocks(rounded, name), name)
        return self._dequantized_matmul(x, rounded, name)

    def quantize(self, matrix: Tensor, gram: Tensor | None) -> QuantizedMatrix:
        """A matrix [K, N] rounded by the storage's quantizer."""
        assert self.storage.bits is not None
        return quantize(matrix, self.storage.bits, self.storage.quantizer, gram)

    def blocks(self, matrix: QuantizedMatrix, name: str) -> list[str]:
        """Names of the packed levels, the scales and, where there are any, the zero points."""
        stored = [
            self.g.tensor(f"{name}.blocks", torch.from_numpy(matrix.packed)),
            self.g.weight(f"{name}.scales", torch.from_numpy(matrix.scales)),
        ]
        if matrix.zeros is not None:
            stored.append(self.g.tensor(f"{name}.zeros", torch.from_numpy(matrix.zeros)))
        return stored

    def matmul_nbits(self, x: str, matrix: QuantizedMatrix, stored: list[str], name: str) -> str:
        """x [.., K] times a matrix [K, N] by its stored blocks, inside one operator."""
        y: str = self.g.node(
            "MatMulNBits",
            [x, *stored],
            name=name,
            domain="com.microsoft",
            K=matrix.rows,
            N=matrix.packed.shape[0],
            bits=matrix.bits,
            block_size=BLOCK,
            accuracy_level=_ACCURACY_LEVEL,
        )
        return y

    def _dequantized_matmul(self, x: str, matrix: QuantizedMatrix, name: str) -> str:
        values, scales = matrix.transposed()
        padded, columns = scales.shape[0] * BLOCK, scales.shape[1]
        kind = TensorProto.INT4 if matrix.bits == 4 else TensorProto.INT8
        stored = self.g.raw(f"{name}.values", kind, [padded, columns], values)
        read = [stored, self.g.weight(f"{name}.scales", torch.from_numpy(scales))]
        zeros = matrix.transposed_zeros()
        if zeros is not None:
            read.append(self.g.raw(f"{name}.zeros", kind, scales.shape, zeros))
        whole = self.g.node("DequantizeLinear", read, name=f"{name}.weight", axis=0,
                            block_size=BLOCK)  # fmt: skip
        # Padded, for OpenVINO refuses a last block that is not whole.
        if padded != matrix.rows:
            whole = self.g.node(
                "Slice", [whole, self.g.constant([0]), self.g.constant([matrix.rows])]
            )
        y: str = self.g.node("MatMul", [x, whole], name=name)
        return y


def linear_name(at: str, projections: Sequence[str]) -> str:
    """The name of a (packed) projection's node: `model.layers.0.self_attn.q_k_v`."""
    return f"{at}.{'_'.join(p.removesuffix('_proj') for p in projections)}"
