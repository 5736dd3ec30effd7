"""Faults of a written graph, read off the graph itself: whatever the writer emits gets its faults.

Of the nodes and tensors of layers, those of the last layer; all that belongs to none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

Change = Callable[[onnx.GraphProto], None]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A fault by its kind, where it is (layers as #), and the operator or the class of tensors."""

    of: str
    where: str
    kind: str
    change: Change

    @property
    def name(self) -> str:
        return f"{self.where}: {self.kind}"


_LAYER = re.compile(r"(?:model\.layers|attention|rotary)\.(\d+)")


def graph_mutations(graph: onnx.GraphProto) -> Iterator[Mutation]:
    """Every fault of one graph."""
    last = max(int(found) for node in graph.node for found in _LAYER.findall(node.name))
    kinds: dict[str, int] = {}
    for index in _nodes_of(graph, last):
        node = graph.node[index]
        where = _role(node, graph)
        count = kinds[where] = kinds.get(where, 0) + 1
        where = f"{where} ({count})" if count > 1 else where
        yield from _of_a_node(graph, index, where)
    change = _one_as_another
    yield Mutation(of="Gather", where="input_ids", kind="one read as another", change=change)
    for tensor in graph.initializer:
        layer = _LAYER.search(tensor.name)
        if layer is None or int(layer.group(1)) == last:
            yield from _of_a_tensor(tensor, _LAYER.sub(_hashed, tensor.name))


def _one_as_another(graph: onnx.GraphProto) -> None:
    """The last but one of 97 token ids, which stands in no text, is read as the last."""
    for node in graph.node:
        node.input[:] = ["ids.wrong" if name == "input_ids" else name for name in node.input]
    one, other = (numpy_helper.from_array(np.array(i), f"ids.{i}") for i in (95, 96))
    graph.initializer.extend([one, other])
    found = helper.make_node("Equal", ["input_ids", one.name], ["ids.found"], name="ids.found")
    wrong = helper.make_node(
        "Where", ["ids.found", other.name, "input_ids"], ["ids.wrong"], name="ids.wrong"
    )
    nodes = [found, wrong, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _hashed(found: re.Match[str]) -> str:
    return found.group(0).replace(found.group(1), "#")


def _nodes_of(graph: onnx.GraphProto, last: int) -> Iterator[int]:
    """Nodes of the last layer and of none; one without a layer's name belongs to the one before."""
    layer: int | None = None
    for index, node in enumerate(graph.node):
        named = _LAYER.search(node.name)
        if named:
            layer = int(named.group(1))
        elif node.name.startswith(("final_norm", "wanted", "lm_head", "cast_logits")):
            layer = None
        if layer in (None, last):
            yield index


def _role(node: NodeProto, graph: onnx.GraphProto) -> str:
    """The operator, and the name if it was given one; else what it reads or who reads it."""
    if not re.fullmatch(rf"{node.op_type}_\d+", node.name):
        return f"{node.op_type} {_LAYER.sub(_hashed, node.name)}"
    near = [*node.input, *(n.name for n in graph.node if set(node.output) & set(n.input))]
    named = [name for name in near if name and not re.fullmatch(r"\w+_\d+(?:\.\d)?", name)]
    return f"{node.op_type} at {_LAYER.sub(_hashed, named[0])}" if named else node.op_type


def _of_a_node(graph: onnx.GraphProto, index: int, where: str) -> Iterator[Mutation]:
    node = graph.node[index]
    for kind, change in _changes_of_a_node(graph, node, index):
        yield Mutation(of=node.op_type, where=where, kind=kind, change=change)


def _changes_of_a_node(
    graph: onnx.GraphProto, node: NodeProto, index: int
) -> Iterator[tuple[str, Change]]:
    constants = {tensor.name for tensor in graph.initializer}
    data = [name for name in node.input if name and name not in constants]
    if data:
        yield "bypassed", _bypass(index, data[0])
    inputs = [i for i, name in enumerate(node.input) if name]
    if len(inputs) > 1 and node.input[inputs[0]] != node.input[inputs[1]]:
        yield "first inputs swapped", _swap(index, *inputs[:2])
    for i, name in enumerate(node.input):
        other = _of_another_layer(graph, name)
        if other:
            yield f"input {i} of another layer", _read(index, i, other)
    for attribute in node.attribute:
        yield f"{attribute.name} dropped", _drop(index, attribute.name)
        for what, value in _other_values(attribute):
            yield f"{attribute.name} {what}", _set(index, attribute.name, value)


def _of_another_layer(graph: onnx.GraphProto, name: str) -> str | None:
    """A tensor of the same kind and size in another layer."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    if name not in tensors or not _LAYER.search(name):
        return None
    role, dims = _LAYER.sub(_hashed, name), list(tensors[name].dims)
    for other, tensor in tensors.items():
        if other != name and _LAYER.sub(_hashed, other) == role and list(tensor.dims) == dims:
            return other
    return None


def _bypass(index: int, data: str) -> Change:
    """Every output is what the node reads; a cache stays as it was."""

    def change(graph: onnx.GraphProto) -> None:
        node = graph.node[index]
        copies = []
        for output in filter(None, node.output):
            past = output.replace("present", "past_key_values")
            source = past if past in node.input else data
            copies.append(helper.make_node("Identity", [source], [output], name=f"{output}.copy"))
        nodes = [*graph.node[:index], *copies, *graph.node[index + 1 :]]
        del graph.node[:]
        graph.node.extend(nodes)

    return change


def _swap(index: int, a: int, b: int) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        read = graph.node[index].input
        read[a], read[b] = read[b], read[a]

    return change


def _read(index: int, i: int, name: str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        graph.node[index].input[i] = name

    return change


def _drop(index: int, name: str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        kept = [entry for entry in graph.node[index].attribute if entry.name != name]
        del graph.node[index].attribute[:]
        graph.node[index].attribute.extend(kept)

    return change


def _set(index: int, name: str, value: Any) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        for entry in graph.node[index].attribute:
            if entry.name == name:
                entry.CopyFrom(helper.make_attribute(name, value))

    return change


_OTHER_TYPE = {
    TensorProto.FLOAT: TensorProto.FLOAT16,
    TensorProto.FLOAT16: TensorProto.FLOAT,
    TensorProto.BOOL: TensorProto.INT64,
    TensorProto.INT32: TensorProto.INT64,
    TensorProto.INT64: TensorProto.INT32,
}


def _other_values(attribute: AttributeProto) -> Iterator[tuple[str, Any]]:
    name, value = attribute.name, helper.get_attribute_value(attribute)
    if name == "to":
        yield "another type", _OTHER_TYPE[value]
    elif isinstance(value, float):
        yield from (("x 10", value * 10), ("x 1.1", value * 1.1))
    elif isinstance(value, list):
        yield "its last two swapped", [*value[:-2], value[-1], value[-2]]
    elif value in (0, 1):
        yield f"{1 - value}", 1 - value
    elif value == -1:
        yield from (("-2", -2), ("4", 4))
    elif name == "block_size":
        yield from (("x 2", value * 2), ("/ 2", value // 2))
    elif isinstance(value, int):
        yield from (("+ 1", value + 1), ("- 1", value - 1))


def _of_a_tensor(tensor: TensorProto, where: str) -> Iterator[Mutation]:
    array = numpy_helper.to_array(tensor)
    if not array.size:
        return
    floating = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    for kind, fault in (_FLOAT_FAULTS if floating else _INTEGER_FAULTS).items():
        if array.size > 1 or kind not in ("rolled", "one value"):
            change = _edit(tensor.name, fault)
            yield Mutation(of=_class_of(where), where=where, kind=kind, change=change)


_CLASSES = {
    r"norm\.weight$": "weight of a norm",
    r"bias$": "bias",
    r"lm_head|^embed": "embedding, head",
    r"embed_tokens": "embedding, head",
    r"^rotary\.": "rotary table",
    r"^const\.|logits_from": "integer constant",
    r"^eps|^scale|^mask": "scalar",
    r"scales$": "scales of a matrix",
    r"zeros$": "zero points of a matrix",
    r"blocks$|values$": "levels of a matrix",
    r"layers": "matrix",
}


def _class_of(where: str) -> str:
    return next(name for pattern, name in _CLASSES.items() if re.search(pattern, where))


def _edit(name: str, fault: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name == name:
                array = numpy_helper.to_array(tensor)
                edited = np.array(fault(array), array.dtype).reshape(array.shape)
                tensor.CopyFrom(numpy_helper.from_array(edited, name))

    return change


def _one(value: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """One of the values, in the middle, changed."""

    def fault(array: np.ndarray) -> np.ndarray:
        edited = np.array(array)
        flat = edited.reshape(-1)
        flat[flat.size // 2] = value(flat[flat.size // 2])
        return edited

    return fault


_FLOAT_FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x 1.01": lambda a: a * 1.01,
    "zero": lambda a: a * 0,
    "rolled": lambda a: np.roll(a, 1, axis=0),
    "one value": _one(lambda x: x * 1.5 + 0.1),
    "one not a number": _one(lambda x: np.nan),
}
_INTEGER_FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rolled": lambda a: np.roll(a, 1, axis=0),
    "one value": _one(lambda x: int(x) + 1 if int(x) % 8 < 7 else int(x) - 1),
    "all + 1": lambda a: a.astype(np.int64) + 1,
}
