"""Matrices of a decoder: projections with their biases and adapters, embedding, vocabulary head.

How a matrix is stored follows from precision and flavour:

- fp32, fp16, bf16: MatMul with a [in, out] weight; tied embeddings are one tensor in the file.
- int8, int4 with com.microsoft operators: MatMulNBits; tied embeddings are read by
  GatherBlockQuantized from the head's own blocks.
- int8, int4 with ai.onnx alone: blocked DequantizeLinear (opset 21) before a MatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from onnx import TensorProto
from torch import Tensor

from atp_edge.model.families import ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.quantization.quantize import BLOCK, Bits, Blocks, Quantizer, quantize

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


def linear(
    g: GraphBuilder,
    storage: Storage,
    shape: ModelShape,
    weights: Weights,
    x: str,
    at: str,
    projections: Sequence[str],
) -> str:
    """Projections of one input as one matrix [in, sum of out], with their biases if any."""
    parts = [weights(f"{at}.{p}.weight") for p in projections]
    label = linear_name(at, projections)
    gram = storage.grams.get(f"{at}.{projections[0]}")
    y = matmul(g, storage, x, torch.cat(parts).T, label, gram)
    if not shape.biased.isdisjoint(projections):
        biases = [
            weights(f"{at}.{p}.bias") if p in shape.biased else torch.zeros(len(part))
            for p, part in zip(projections, parts, strict=True)
        ]
        bias = g.weight(f"{label}.bias", torch.cat(biases))
        y = g.node("Add", [y, bias], name=f"{label}.biased")
    if storage.adapters:
        y = _add_adapter(g, x, y, label, parts[0].shape[1], sum(map(len, parts)))
    return y


def linear_name(at: str, projections: Sequence[str]) -> str:
    """The name of a (packed) projection's node: `model.layers.0.self_attn.q_k_v`."""
    return f"{at}.{'_'.join(p.removesuffix('_proj') for p in projections)}"


def _add_adapter(g: GraphBuilder, x: str, y: str, label: str, rows: int, columns: int) -> str:
    """y + (x A) B; A [in, r] and B [r, out] are inputs of rank 0 unless an adapter gives them."""
    rank = f"{label}.rank"
    a = g.optional_input(f"{label}.lora_A", torch.zeros(rows, 0, dtype=g.dtype), [rows, rank])
    b = g.optional_input(f"{label}.lora_B", torch.zeros(0, columns, dtype=g.dtype), [rank, columns])
    low = g.node("MatMul", [x, a], name=f"{label}.lora_low")
    change = g.node("MatMul", [low, b], name=f"{label}.lora")
    adapted: str = g.node("Add", [y, change], name=f"{label}.adapted")
    return adapted


def matmul(
    g: GraphBuilder,
    storage: Storage,
    x: str,
    matrix: Tensor,
    name: str,
    gram: Tensor | None = None,
) -> str:
    """x [.., K] times a constant matrix [K, N]; gram [K, K] of x on calibration text, for gptq."""
    if storage.bits is None:
        y: str = g.node("MatMul", [x, g.weight(f"{name}.weight", matrix)], name=name)
        return y
    blocks = quantize(matrix, storage.bits, storage.quantizer, gram)
    if storage.contrib:
        return _matmul_nbits(g, x, blocks, _store_blocks(g, blocks, name), name)
    return _dequantized_matmul(g, x, blocks, name)


def _store_blocks(g: GraphBuilder, blocks: Blocks, name: str) -> list[str]:
    """Names of the packed levels, the scales and, where there are any, the zero points."""
    stored = [
        g.tensor(f"{name}.blocks", torch.from_numpy(blocks.packed)),
        g.weight(f"{name}.scales", torch.from_numpy(blocks.scales)),
    ]
    if blocks.zeros is not None:
        stored.append(g.tensor(f"{name}.zeros", torch.from_numpy(blocks.zeros)))
    return stored


def _matmul_nbits(g: GraphBuilder, x: str, blocks: Blocks, stored: list[str], name: str) -> str:
    y: str = g.node(
        "MatMulNBits",
        [x, *stored],
        name=name,
        domain="com.microsoft",
        K=blocks.rows,
        N=blocks.packed.shape[0],
        bits=blocks.bits,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    return y


def _dequantized_matmul(g: GraphBuilder, x: str, blocks: Blocks, name: str) -> str:
    values, scales = blocks.transposed()
    padded, columns = scales.shape[0] * BLOCK, scales.shape[1]
    kind = TensorProto.INT4 if blocks.bits == 4 else TensorProto.INT8
    stored = g.raw(f"{name}.values", kind, [padded, columns], values)
    read = [stored, g.weight(f"{name}.scales", torch.from_numpy(scales))]
    zeros = blocks.transposed_zeros()
    if zeros is not None:
        read.append(g.raw(f"{name}.zeros", kind, scales.shape, zeros))
    matrix = g.node("DequantizeLinear", read, name=f"{name}.weight", axis=0, block_size=BLOCK)
    if padded != blocks.rows:
        matrix = g.node("Slice", [matrix, g.constant([0]), g.constant([blocks.rows])])
    y: str = g.node("MatMul", [x, matrix], name=name)
    return y


def embedding_and_head(
    g: GraphBuilder, storage: Storage, shape: ModelShape, weights: Weights, ids: str
) -> tuple[str, Callable[[str], str]]:
    """(hidden states of the tokens, the function from normalized hidden states to logits).

    Tied matrices are stored once where the flavour can read the head's tensor by rows.
    """
    name, gram = "model.embed_tokens.weight", storage.grams.get("lm_head")
    if storage.bits is not None and storage.contrib and shape.tied and not shape.hidden % BLOCK:
        blocks = quantize(weights(name).T, storage.bits, storage.quantizer, gram)
        stored = _store_blocks(g, blocks, "lm_head")
        embedded = _gather_blocks(g, ids, blocks, stored)
        return embedded, lambda x: _matmul_nbits(g, x, blocks, stored, "lm_head")
    table = g.weight(name, weights(name))
    embedded = g.node("Gather", [table, ids], name="embed")
    if storage.bits is None and shape.tied:
        by_table = _fused_table_head if storage.contrib else _table_head
        return embedded, lambda x: by_table(g, shape, x, table)
    head = name if shape.tied else "lm_head.weight"
    return embedded, lambda x: matmul(g, storage, x, weights(head).T, "lm_head", gram)


def _gather_blocks(g: GraphBuilder, ids: str, blocks: Blocks, stored: list[str]) -> str:
    rows, count, size = blocks.packed.shape
    table = g.node("Reshape", [stored[0], g.constant([rows, count * size])], name="embed.blocks")
    embedded: str = g.node(
        "GatherBlockQuantized",
        [table, ids, *stored[1:]],
        name="embed",
        domain="com.microsoft",
        bits=blocks.bits,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    return embedded


def _fused_table_head(g: GraphBuilder, shape: ModelShape, hidden: str, table: str) -> str:
    """Logits by the embedding's own table [V, H], transposed inside the operator: one node."""
    logits: str = g.node(
        "FusedMatMul", [hidden, table], name="lm_head", domain="com.microsoft", transB=1
    )
    return logits


def _table_head(g: GraphBuilder, shape: ModelShape, hidden: str, table: str) -> str:
    """Logits by the embedding's own table [V, H]: Gemm reads it transposed."""
    flat = g.node("Reshape", [hidden, g.constant([-1, shape.hidden])])
    scores = g.node("Gemm", [flat, table], name="lm_head", transB=1)
    batch = g.node("Shape", ["input_ids"], start=0, end=1)
    dims = g.node("Concat", [batch, g.constant([-1, shape.vocabulary])], axis=0)
    logits: str = g.node("Reshape", [scores, dims])
    return logits
