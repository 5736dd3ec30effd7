"""Matrices of a decoder: projections with their biases and adapters.

How a matrix is stored, atp_edge.model.storage says; it is read by

- MatMul in fp32, fp16 and bf16;
- MatMulNBits in int8 and int4, where com.microsoft operators may be used;
- blocked DequantizeLinear (opset 21) and MatMul where not: ONNX Runtime makes MatMulNBits of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from atp_edge.model.storage import BLOCK, Storage, Stored, linear_name
from atp_export.graph.builder import GraphBuilder
from atp_export.quantization.quantize import quantize

# int8 activations inside MatMulNBits: without them CPUs take a slow path (one token, 2048 x 4096,
# 2 x86 cores: 0.36 ms instead of 0.09 at 4 bits, 30 instead of 0.12 at 8).
_ACCURACY_LEVEL = 4


class Weights(Protocol):
    """Tensors of a checkpoint by name, read when asked for."""

    def __call__(self, name: str) -> Tensor: ...


class MatrixWriter:
    """Adds constant matrices and their products to a graph."""

    def __init__(
        self,
        g: GraphBuilder,
        storage: Storage,
        biased: frozenset[str],
        weights: Weights,
        grams: Mapping[str, Tensor],
    ) -> None:
        """biased: the projections that carry a bias. grams: calibration for gptq, by the path of a
        packed matrix's first projection, lm_head or model.embed_tokens."""
        self.g, self.storage, self.biased = g, storage, biased
        self.weights, self.grams = weights, grams

    def vector(self, name: str) -> str:
        """A vector of the checkpoint, under its own name."""
        return self.g.weight(name, self.weights(name))

    def linear(self, x: str, at: str, projections: Sequence[str]) -> str:
        """Projections of one input as one matrix [in, sum of out], with their biases if any."""
        parts = [self.weights(f"{at}.{p}.weight") for p in projections]
        label, matrix = linear_name(at, projections), torch.cat(parts).T
        y = self.matmul(x, matrix, label, self.grams.get(f"{at}.{projections[0]}"))
        if not self.biased.isdisjoint(projections):
            biases = [
                self.weights(f"{at}.{p}.bias") if p in self.biased else torch.zeros(len(part))
                for p, part in zip(projections, parts, strict=True)
            ]
            bias = self.g.weight(f"{label}.bias", torch.cat(biases))
            y = self.g.node("Add", [y, bias], name=f"{label}.biased")
        return self._adapted(x, y, label, matrix) if self.storage.adapter_rank is not None else y

    def _adapted(self, x: str, y: str, label: str, matrix: Tensor) -> str:
        """y + (x A) B. A [in, r] and B [r, out] are inputs, of rank 0 without an adapter."""
        (rows, columns), rank = matrix.shape, f"{label}.rank"
        no_a, no_b = (torch.zeros(n, dtype=self.g.dtype) for n in ((rows, 0), (0, columns)))
        a = self.g.optional_input(f"{label}.lora_A", no_a, [rows, rank])
        b = self.g.optional_input(f"{label}.lora_B", no_b, [rank, columns])
        low = self.g.node("MatMul", [x, a], name=f"{label}.lora_low")
        change = self.g.node("MatMul", [low, b], name=f"{label}.lora")
        return self.g.node("Add", [y, change], name=f"{label}.adapted")

    def matmul(self, x: str, matrix: Tensor, name: str, gram: Tensor | None = None) -> str:
        """x [.., K] times a matrix [K, N]; gram [K, K] of x on calibration text, for gptq."""
        rows, columns = matrix.shape
        tensors = self.storage.matrix(name, rows, columns)
        if self.storage.bits is None:
            return self.g.node("MatMul", [x, self.g.weight(tensors[0].name, matrix)], name=name)
        return self.product(x, self.rounded(tensors, matrix, gram), name, rows, columns)

    def rounded(self, tensors: Sequence[Stored], matrix: Tensor, gram: Tensor | None) -> list[str]:
        """Store a matrix [K, N], quantized: the names of levels, scales and any zero points."""
        assert self.storage.bits is not None
        made = quantize(matrix, self.storage.bits, self.storage.quantizer, gram)
        # An embedding's rows are packed alike in every flavour.
        arrays = made.arrays(fused=tensors[0].kind == "uint8")
        return [self.g.store(t, array) for t, array in zip(tensors, arrays, strict=True)]

    def product(self, x: str, stored: list[str], name: str, rows: int, columns: int) -> str:
        """x [.., rows] times a stored quantized matrix."""
        if self.storage.fused:
            return self.g.node(
                "MatMulNBits",
                [x, *stored],
                name=name,
                domain="com.microsoft",
                K=rows,
                N=columns,
                bits=self.storage.bits,
                block_size=BLOCK,
                accuracy_level=_ACCURACY_LEVEL,
            )
        matrix = self.g.node(
            "DequantizeLinear", stored, name=f"{name}.weight", axis=0, block_size=BLOCK
        )
        # Padded, for OpenVINO takes whole blocks alone.
        if rows % BLOCK:
            matrix = self.g.node("Slice", [matrix, self.g.constant([0]), self.g.constant([rows])])
        return self.g.node("MatMul", [x, matrix], name=name)
