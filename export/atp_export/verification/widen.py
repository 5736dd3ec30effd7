"""An exported graph with its types widened to fp32: what it computes, without its rounding.

Rules, each of one kind of node; all others stay as they are:

1. Half floats become fp32: initializers, inputs and outputs, casts, tensors in attributes.
2. MatMulNBits -> FusedMatMul with the fp32 weight [N, K] (int8 activations go with it).
3. GatherBlockQuantized -> Gather from the fp32 table.
4. DequantizeLinear of constants -> an fp32 initializer; of gathered rows -> Gather from the table.
5. What only reorders the constants of 2 to 4 is evaluated; what nothing reads any more goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from atp_export.graph.builder import GraphBuilder
from atp_export.verification.blocks import (
    Quantized,
    of_dequantize_linear,
    of_gather_block_quantized,
    of_matmul_nbits,
)
from atp_export.verification.tensors import HALVES, Tensors, widened

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Widened:
    """What was read of an exported folder, and where its fp32 form lies."""

    folder: Path
    graph: onnx.GraphProto
    """The fp32 form's, without its tensors."""
    stored: Tensors
    """The exported folder's own tensors."""
    quantized: Mapping[str, Callable[[], Quantized]]
    """By the name of an fp32 form's tensor: the levels it stands for, read when called."""
    not_finite: tuple[str, ...]
    """Float tensors of the exported folder that hold NaN or infinity."""
    quantizer: str
    """How the file says that its levels were chosen; empty where it says nothing."""


def widen(folder: Path, out: Path) -> Widened:
    """Write out/model.onnx and its data: the fp32 form of folder/model.onnx.

    Raises ValueError where the file contradicts itself.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = _Graph(model.graph, Tensors(folder, model.graph))
    nodes = [new for node in model.graph.node for new in graph.rewritten(node)]
    builder = GraphBuilder(out, torch.float32)
    builder.nodes = alive(nodes, {value.name for value in model.graph.output})
    builder.inputs = [_widened_value(value) for value in model.graph.input]
    builder.outputs = [_widened_value(value) for value in model.graph.output]
    read = {name for node in builder.nodes for name in node.input}
    read |= {value.name for value in model.graph.input}
    not_finite = [name for name in graph.constants & read if not _write(builder, name, graph)]
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    builder.finish(opset=opsets[""], contrib="com.microsoft" in opsets, metadata={})
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Widened(
        folder=out,
        graph=onnx.load(out / "model.onnx", load_external_data=False).graph,
        stored=graph.tensors,
        quantized=graph.quantized,
        not_finite=tuple(sorted(not_finite)),
        quantizer=metadata.get("quantizer", ""),
    )


def _write(builder: GraphBuilder, name: str, graph: _Graph) -> bool:
    """Write one tensor of the fp32 form; whether all of it is finite."""
    array = graph.value(name)
    if array.dtype.kind in "iub" and array.dtype.name not in ("int4", "uint4", "bfloat16"):
        kind, finite = helper.np_dtype_to_tensor_dtype(array.dtype), True
    else:
        array = widened(array)
        kind, finite = TensorProto.FLOAT, bool(np.isfinite(array).all())
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    builder.raw(name, kind, array.shape, flat)
    return finite


class _Graph:
    """The exported graph, and the constants that its fp32 form has in place of levels."""

    def __init__(self, graph: onnx.GraphProto, tensors: Tensors) -> None:
        self.tensors = tensors
        self.made: dict[str, Callable[[], Array]] = {}
        self.quantized: dict[str, Callable[[], Quantized]] = {}
        self._writers = {name: node for node in graph.node for name in node.output}
        self._inputs = {value.name for value in graph.input}
        self._tables: dict[tuple[Any, ...], str] = {}

    @property
    def constants(self) -> set[str]:
        return set(self.made) | set(self.tensors.protos)

    def constant(self, name: str) -> bool:
        """Whether a value follows from the file alone."""
        if name in self.made or (name in self.tensors and name not in self._inputs):
            return True
        writer = self._writers.get(name)
        return writer is not None and bool(writer.input) and all(map(self.constant, writer.input))

    def value(self, name: str) -> Array:
        """A constant."""
        if name in self.made:
            return self.made[name]()
        return self.tensors(name) if name in self.tensors else self._evaluated(self._writers[name])

    def rewritten(self, node: NodeProto) -> list[NodeProto]:
        """The nodes of the fp32 form in place of one."""
        match node.op_type:
            case "MatMulNBits":
                return self._matmul(node)
            case "GatherBlockQuantized":
                return self._gather(node)
            case "DequantizeLinear" if all(map(self.constant, node.input)):
                self._make_dequantized(node.output[0], node, list(node.input))
                return []
            case "DequantizeLinear":
                return self._gathered_rows(node)
        if any(name in self.made for name in node.input) and all(map(self.constant, node.input)):
            self.made[node.output[0]] = lambda: self._evaluated(node)
            if node.input[0] in self.quantized:
                self.quantized[node.output[0]] = self.quantized[node.input[0]]
            return []
        return [_widened_node(node)]

    def _matmul(self, node: NodeProto) -> list[NodeProto]:
        x, packed, scales, *rest = node.input
        zeros = rest[0] if rest else ""
        if len(rest) > 1:
            raise ValueError(
                f"{node.name}: MatMulNBits with {len(rest) + 3} inputs is not known here"
            )
        said = attributes(node)
        shape = (said["N"], said["K"])
        table = self._table(node, of_matmul_nbits, (packed, scales, zeros), shape)
        product = helper.make_node(
            "FusedMatMul", [x, table], node.output, name=node.name, domain="com.microsoft", transB=1
        )
        return [product]

    def _gather(self, node: NodeProto) -> list[NodeProto]:
        packed, ids, scales, *rest = node.input
        zeros = rest[0] if rest else ""
        rows, columns = self.value(packed).shape
        shape = (rows, columns * 8 // attributes(node).get("bits", 4))
        table = self._table(node, of_gather_block_quantized, (packed, scales, zeros), shape)
        return [helper.make_node("Gather", [table, ids], node.output, name=node.name)]

    def _table(
        self, node: NodeProto, read: Any, inputs: tuple[str, str, str], shape: tuple[int, int]
    ) -> str:
        """The name of the fp32 matrix of a node's levels; one for all who read the same ones."""
        said = attributes(node)
        root = self._root(inputs[0])
        key = (root, *inputs[1:], said.get("bits", 4), said.get("block_size", 128), shape)
        if key not in self._tables:
            name = self._tables[key] = f"{node.name}.weight"
            packed, scales, zeros = inputs

            def quantized() -> Quantized:
                return read(
                    said,
                    self.value(packed),
                    self.value(scales),
                    self.value(zeros) if zeros else None,
                )

            self.quantized[name] = quantized
            self.made[name] = lambda: quantized().values()
        return self._tables[key]

    def _root(self, name: str) -> Any:
        """Where the bytes of a constant lie, whatever shape it has: two names may share them."""
        writer = self._writers.get(name)
        if writer is not None and writer.op_type == "Reshape":
            return self._root(writer.input[0])
        return self.tensors.place(name) if name in self.tensors else name

    def _make_dequantized(self, name: str, node: NodeProto, inputs: list[str]) -> None:
        def read() -> tuple[Quantized, bool]:
            values, scales, *rest = map(self.value, inputs)
            zeros = rest[0] if rest else None
            return of_dequantize_linear(attributes(node), values, scales, zeros)

        def made() -> Array:
            quantized, turned = read()
            return quantized.values().T if turned else quantized.values()

        self.made[name], self.quantized[name] = made, lambda: read()[0]

    def _gathered_rows(self, node: NodeProto) -> list[NodeProto]:
        """Rows of levels, of scales and of zero points, gathered by the same ids."""
        gathers = [self._writers.get(name) for name in node.input]
        tables = [g.input[0] for g in gathers if g is not None and g.op_type == "Gather"]
        ids = {g.input[1] for g in gathers if g is not None and g.op_type == "Gather"}
        if len(tables) < len(gathers) or len(ids) > 1 or not all(map(self.constant, tables)):
            return [_widened_node(node)]
        name = f"{node.name}.weight"
        along_columns = NodeProto()
        along_columns.CopyFrom(node)
        for attribute in along_columns.attribute:
            if attribute.name == "axis":
                attribute.i = 1
        self._make_dequantized(name, along_columns, tables)
        return [helper.make_node("Gather", [name, ids.pop()], node.output, name=node.name)]

    def _evaluated(self, node: NodeProto) -> Array:
        """A node of constants, as onnx's own reference computes it."""
        feeds = {name: self.value(name) for name in node.input if name}
        (result,) = ReferenceEvaluator(node).run(None, feeds)
        return result


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def alive(nodes: Sequence[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes whose results reach an output."""
    wanted, reaching = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(filter(None, node.input))
            reaching.append(node)
    return reaching[::-1]


def _widened_node(node: NodeProto) -> NodeProto:
    """A copy whose attributes name no half floats."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type in HALVES:
            attribute.t.CopyFrom(
                numpy_helper.from_array(widened(numpy_helper.to_array(attribute.t)))
            )
    return copy


def _widened_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A copy of an input's or an output's type, half floats as fp32."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    if copy.type.tensor_type.elem_type in HALVES:
        copy.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy
