"""The two matrices of the vocabulary: the embedding [V, H], read by rows, and the head [H, V].

Tied, they are in the file once. In int8 and int4 both are quantized: rows of the embedding are
gathered and then dequantized, by GatherBlockQuantized or by a `TableReader`'s ai.onnx operators.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from atp_edge.model.families import ModelShape
from atp_edge.model.storage import BLOCK, EMBEDDING, HEAD, Stored
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.matrix import MatrixWriter
from atp_export.graph.table import TableReader

_TABLE = f"{EMBEDDING}.weight"


class VocabularyWriter:
    """Adds the embedding and the head to a graph; `embed` comes first."""

    def __init__(self, g: GraphBuilder, shape: ModelShape, matrices: MatrixWriter) -> None:
        self.g, self.shape, self.matrices, self.storage = g, shape, matrices, matrices.storage
        self._head: list[str] = []

    def embed(self, ids: str) -> str:
        """Hidden states of tokens, named `embed`."""
        if self.storage.bits is None:
            table = self.matrices.vector(_TABLE)
            return self.g.node("Gather", [table, ids], name="embed")
        whole = not self.shape.hidden % BLOCK
        name = "embed" if whole else "embed.padded"
        padded = self._tied(ids, name) if self.shape.tied else self._untied(ids, name)
        if whole:
            return padded
        ends = [self.g.constant([n]) for n in (0, self.shape.hidden, -1)]
        return self.g.node("Slice", [padded, *ends], name="embed")

    def head(self, hidden: str) -> str:
        """Logits of normalized hidden states."""
        if self._head:
            size = self.shape.hidden, self.shape.vocabulary
            return self.matrices.product(hidden, self._head, HEAD, *size)
        if self.shape.tied:
            by_table = self._fused_table_head if self.storage.fused else self._table_head
            return by_table(hidden)
        matrix = self.matrices.weights(f"{HEAD}.weight").T
        return self.matrices.matmul(hidden, matrix, HEAD, self.matrices.grams.get(HEAD))

    def _tied(self, ids: str, name: str) -> str:
        """The head's own levels, read by the embedding under names of their own."""
        tensors = self.storage.matrix(HEAD, self.shape.hidden, self.shape.vocabulary)
        self._head = self._rounded(tensors, HEAD)
        if not self.storage.fused:
            return self._reader().columns(tensors, ids, name)
        levels, *others = self._head
        row = tensors[0].nbytes // self.shape.vocabulary
        dims = [self.shape.vocabulary, row]
        table = self.g.view("embed.blocks", TensorProto.UINT8, dims, levels)
        return self._gather_blocks([table, *others], ids, name)

    def _untied(self, ids: str, name: str) -> str:
        tensors = self.storage.table(EMBEDDING, self.shape.vocabulary, self.shape.hidden)
        stored = self._rounded(tensors, EMBEDDING)
        if self.storage.fused:
            return self._gather_blocks(stored, ids, name)
        return self._reader().rows(stored, ids, name)

    def _rounded(self, tensors: Sequence[Stored], gram: str) -> list[str]:
        matrix = self.matrices.weights(_TABLE).T
        return self.matrices.rounded(tensors, matrix, self.matrices.grams.get(gram))

    def _reader(self) -> TableReader:
        assert self.storage.bits is not None
        return TableReader(self.g, self.storage.bits, self.shape.vocabulary, self.shape.hidden)

    def _gather_blocks(self, stored: Sequence[str], ids: str, name: str) -> str:
        blocks = -(-self.shape.hidden // BLOCK)
        # Below 1.27, ONNX Runtime reads an odd number of 4-bit zero points wrongly.
        if self.storage.has_zeros and self.storage.bits == 4 and blocks % 2:
            return self._reader().rows(stored, ids, name)
        levels, *others = stored
        return self.g.node(
            "GatherBlockQuantized",
            [levels, ids, *others],
            name=name,
            domain="com.microsoft",
            bits=self.storage.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def _fused_table_head(self, hidden: str) -> str:
        """Logits by the embedding's own table, transposed inside the operator: one node."""
        return self.g.node(
            "FusedMatMul", [hidden, _TABLE], name=HEAD, domain="com.microsoft", transB=1
        )

    def _table_head(self, hidden: str) -> str:
        """Logits by the embedding's own table: Gemm reads it transposed."""
        flat = self.g.node("Reshape", [hidden, self.g.constant([-1, self.shape.hidden])])
        scores = self.g.node("Gemm", [flat, _TABLE], name=HEAD, transB=1)
        batch = self.g.node("Shape", ["input_ids"], start=0, end=1)
        dims = self.g.node("Concat", [batch, self.g.constant([-1, self.shape.vocabulary])], axis=0)
        return self.g.node("Reshape", [scores, dims])
