"""The two matrices of the vocabulary: the embedding [V, H], read by rows, and the head [H, V].

Tied ones are one tensor in the file where the flavour can read the head's by rows: in fp32, fp16
and bf16 always, in int8 and int4 with com.microsoft operators.
"""

from __future__ import annotations

from atp_edge.model.families import ModelShape
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.matrix import MatrixWriter
from atp_export.quantization.quantize import BLOCK, QuantizedMatrix

_TABLE = "model.embed_tokens.weight"


class VocabularyWriter:
    """Adds the embedding and the head to a graph; `embed` comes first."""

    def __init__(self, g: GraphBuilder, shape: ModelShape, matrices: MatrixWriter) -> None:
        self.g, self.shape, self.matrices = g, shape, matrices
        self._shared: tuple[QuantizedMatrix, list[str]] | None = None

    def embed(self, ids: str) -> str:
        """Hidden states of tokens."""
        storage = self.matrices.storage
        if storage.bits and storage.contrib and self.shape.tied and not self.shape.hidden % BLOCK:
            matrix = self.matrices.weights(_TABLE).T
            rounded = self.matrices.quantize(matrix, storage.grams.get("lm_head"))
            self._shared = rounded, self.matrices.blocks(rounded, "lm_head")
            return self._gather_blocks(ids, *self._shared)
        embedded: str = self.g.node("Gather", [self.matrices.vector(_TABLE), ids], name="embed")
        return embedded

    def head(self, hidden: str) -> str:
        """Logits of normalized hidden states."""
        storage = self.matrices.storage
        if self._shared is not None:
            return self.matrices.matmul_nbits(hidden, *self._shared, "lm_head")
        if storage.bits is None and self.shape.tied:
            return self._fused_table_head(hidden) if storage.contrib else self._table_head(hidden)
        matrix = self.matrices.weights(_TABLE if self.shape.tied else "lm_head.weight").T
        return self.matrices.matmul(hidden, matrix, "lm_head", storage.grams.get("lm_head"))

    def _gather_blocks(self, ids: str, matrix: QuantizedMatrix, stored: list[str]) -> str:
        rows, count, size = matrix.packed.shape
        whole = self.g.constant([rows, count * size])
        table = self.g.node("Reshape", [stored[0], whole], name="embed.blocks")
        embedded: str = self.g.node(
            "GatherBlockQuantized",
            [table, ids, *stored[1:]],
            name="embed",
            domain="com.microsoft",
            bits=matrix.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        return embedded

    def _fused_table_head(self, hidden: str) -> str:
        """Logits by the embedding's own table, transposed inside the operator: one node."""
        logits: str = self.g.node(
            "FusedMatMul", [hidden, _TABLE], name="lm_head", domain="com.microsoft", transB=1
        )
        return logits

    def _table_head(self, hidden: str) -> str:
        """Logits by the embedding's own table: Gemm reads it transposed."""
        flat = self.g.node("Reshape", [hidden, self.g.constant([-1, self.shape.hidden])])
        scores = self.g.node("Gemm", [flat, _TABLE], name="lm_head", transB=1)
        batch = self.g.node("Shape", ["input_ids"], start=0, end=1)
        dims = self.g.node("Concat", [batch, self.g.constant([-1, self.shape.vocabulary])], axis=0)
        logits: str = self.g.node("Reshape", [scores, dims])
        return logits
