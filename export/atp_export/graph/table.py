"""Rows of a quantized embedding by ai.onnx operators alone: gathered first, dequantized then.

DequantizeLinear before Gather dequantizes the whole table at every token (131 ms in place of 0.05,
49,152 x 576 at 4 bits on one core), and Gather takes no 4-bit values: levels are gathered as bytes
and told apart by integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from atp_edge.model.storage import BLOCK, Bits, Stored
from atp_export.graph.builder import STORED_TYPES, GraphBuilder
from atp_export.graph.flavour import FLOAT, INT64


class TableReader:
    """Adds the reading of one embedding [tokens, hidden] to a graph.

    Levels [B, S, hidden padded to whole blocks] are int64, counted from the lowest; scales and zero
    points are [B, S, blocks].
    """

    def __init__(self, g: GraphBuilder, bits: Bits, tokens: int, hidden: int) -> None:
        self.g, self.bits, self.tokens = g, bits, tokens
        self.blocks = -(-hidden // BLOCK)

    def rows(self, stored: Sequence[str], ids: str, name: str) -> str:
        """Of `Storage.table`: what belongs to a token lies side by side."""
        levels, scales, *zeros = (self.g.node("Gather", [tensor, ids]) for tensor in stored)
        offsets = [self._whole(self._unpacked(packed)) for packed in zeros]
        return self._dequantized(self._unpacked(levels), scales, offsets, name)

    def columns(self, tensors: Sequence[Stored], ids: str, name: str) -> str:
        """Of `Storage.matrix`: a token is a column of what the head multiplies by.

        The head's tensors are read under second names: ONNX Runtime makes MatMulNBits of
        DequantizeLinear and MatMul only where nothing else reads what they read.
        """
        levels, scales, *zeros = tensors
        count = self.blocks * BLOCK
        codes = self._signed(levels, "embed.values", self._places(ids, count))
        of_blocks = self._places(ids, self.blocks)
        offsets = [self._signed(each, "embed.zeros", of_blocks) for each in zeros]
        dims = [scales.nbytes // 4]
        view = self.g.view("embed.scales", STORED_TYPES[scales.kind], dims, scales.name)
        return self._dequantized(codes, self.g.node("Gather", [view, of_blocks]), offsets, name)

    def _places(self, ids: str, rows: int) -> str:
        """Where columns of a matrix [rows, tokens] lie, counted in values: [B, S, rows]."""
        ends = [self.g.constant(n) for n in (0, rows * self.tokens, self.tokens)]
        column = self.g.node("Unsqueeze", [ids, self.g.constant([-1])])
        return self.g.node("Add", [column, self.g.node("Range", ends)])

    def _signed(self, tensor: Stored, name: str, places: str) -> str:
        """Signed values of a tensor at places, counted from the lowest."""
        view = self.g.view(name, TensorProto.UINT8, [tensor.nbytes], tensor.name)
        values = self._bytes(view, places) if self.bits == 8 else self._halves(view, places)
        from_lowest = self.g.node("Add", [values, self.g.constant(2 ** (self.bits - 1))])
        return self.g.node("Mod", [from_lowest, self.g.constant(2**self.bits)])

    def _bytes(self, view: str, places: str) -> str:
        return self._integers(self.g.node("Gather", [view, places]))

    def _halves(self, view: str, places: str) -> str:
        """Of two values a byte, those at places, with what lies above a low one."""
        one, two, fifteen = (self.g.constant(n) for n in (1, 2, 15))
        odd = self.g.node("Mul", [self.g.node("Mod", [places, two]), fifteen])
        shift = self.g.node("Add", [odd, one])
        pairs = self._bytes(view, self.g.node("Div", [places, two]))
        return self.g.node("Div", [pairs, shift])

    def _unpacked(self, packed: str) -> str:
        """Levels of bytes [B, S, n]: two 4-bit levels a byte, the first one low."""
        levels = self._integers(packed)
        if self.bits == 8:
            return levels
        sixteen, last = self.g.constant(16), self.g.constant([-1])
        halves = (self.g.node(op, [levels, sixteen]) for op in ("Mod", "Div"))
        pairs = self.g.node(
            "Concat", [self.g.node("Unsqueeze", [half, last]) for half in halves], axis=-1
        )
        return self.g.node("Reshape", [pairs, self.g.constant([0, 0, -1])])

    def _whole(self, zeros: str) -> str:
        """Zero points without what fills their last byte."""
        if self.blocks % (8 // self.bits) == 0:
            return zeros
        ends = [self.g.constant([n]) for n in (0, self.blocks, -1)]
        return self.g.node("Slice", [zeros, *ends])

    def _dequantized(self, levels: str, scales: str, zeros: Sequence[str], name: str) -> str:
        """(levels - zeros) * scales, [B, S, hidden padded to blocks]."""
        last = self.g.constant([-1])
        blocks = self.g.node("Reshape", [levels, self.g.constant([0, 0, self.blocks, BLOCK])])
        middle = (
            self.g.node("Unsqueeze", [zeros[0], last])
            if zeros
            else self.g.constant(2 ** (self.bits - 1))
        )
        centred = self.g.node("Cast", [self.g.node("Sub", [blocks, middle])], to=FLOAT)
        scaled = self.g.node("Mul", [centred, self.g.node("Unsqueeze", [scales, last])])
        return self.g.node("Reshape", [scaled, self.g.constant([0, 0, -1])], name=name)

    def _integers(self, x: str) -> str:
        return self.g.node("Cast", [x], to=INT64)
