"""The embedding's table as a graph computes it, where no tensor of the graph is it.

Rows of levels that are gathered first and dequantized by arithmetic then are nodes like others in
the fp32 form. For what asks for the whole table, every token is fed to them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from atp_export.runtime.session import load
from atp_export.verification.blocks import Quantized, of_gather_block_quantized
from atp_export.verification.checks import Check, none_of
from atp_export.verification.widen import Widened, alive

IDS, MASK = "input_ids", "attention_mask"
EMBED, TABLE = "embed", "embed.table"
_DATA = "embed.data"
_TOKENS, _BLOCK = 4096, 32
_ROUNDING = 1e-5
"""Of levels that are dequantized by other arithmetic, over the largest of a row."""


def with_table(widened: Widened, tokens: int) -> Widened:
    """The same, its graph (not its file) reading the embedding of a vocabulary from a tensor.

    Raises ValueError for an embedding that follows from more than token ids.
    """
    names = {tensor.name for tensor in widened.graph.initializer}
    node = next((node for node in widened.graph.node if EMBED in node.output), None)
    if node is None or (node.op_type == "Gather" and node.input[0] in names):
        return widened
    ids = _token_ids(widened.graph)
    hidden = 0
    with (widened.folder / _DATA).open("wb") as file:
        # Some rows at a time: a table may be of gigabytes.
        for _, rows in _rows(widened.folder, _from(widened.graph, ids), [ids], tokens):
            if rows.ndim != 2:
                return widened
            hidden = rows.shape[1]
            file.write(np.ascontiguousarray(rows, np.float32).data)
    proto = TensorProto(name=TABLE, dims=(tokens, hidden), data_type=TensorProto.FLOAT)
    refer(proto, _DATA, 0, 4 * tokens * hidden)
    gather = helper.make_node("Gather", [TABLE, ids], [EMBED], name=EMBED)
    nodes = [gather if EMBED in node.output else node for node in widened.graph.node]
    graph = onnx.GraphProto()
    graph.CopyFrom(widened.graph)
    del graph.node[:]
    graph.node.extend(alive(nodes, {value.name for value in graph.output}))
    graph.initializer.append(proto)
    levels = _levels(widened, hidden)
    known = dict(widened.quantized) | ({TABLE: levels} if levels else {})
    return replace(widened, graph=graph, quantized=known)


def read_rows(folder: Path, table: Tensor) -> Check:
    """Whether the graph in a folder, which is in fp32, reads each token id as its own row.

    table: [tokens, hidden], what the file holds.
    """
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = alive(graph.node, {EMBED})
    read = {name for node in nodes for name in node.input}
    inputs = [value.name for value in graph.input if value.name in read]
    if IDS not in inputs or not {IDS, MASK}.issuperset(inputs):
        return none_of("token ids", inputs or [EMBED], "input that the embedding follows from")
    wrong: list[str] = []
    for start, rows in _rows(folder, nodes, inputs, len(table)):
        own = table[start : start + len(rows)].float().cpu().numpy()
        allowed = _ROUNDING * np.abs(own).max(axis=1, keepdims=True)
        same = rows.shape == own.shape
        near = (np.abs(rows - own) <= allowed).all(axis=1) if same else np.zeros(len(own), bool)
        wrong += [str(start + i) for i in np.flatnonzero(~near)]
    return none_of("token ids", wrong, "token id that is not read as its own row")


def refer(proto: TensorProto, file: str, offset: int, length: int) -> None:
    """Let a tensor lie in a file beside the graph."""
    proto.ClearField("raw_data")
    proto.ClearField("external_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def _token_ids(graph: onnx.GraphProto) -> str:
    """The first value that the embedding follows from, besides constants: the input, or what a
    graph makes of it. Raises ValueError where there is none."""
    constants = {tensor.name for tensor in graph.initializer}
    for ids in [IDS, *(name for node in graph.node for name in node.output)]:
        read = {name for node in _from(graph, ids) for name in node.input if name}
        written = {name for node in _from(graph, ids) for name in node.output}
        if ids != EMBED and ids in read and read - written <= constants | {ids}:
            return ids
    raise ValueError("the embedding follows from more than token ids")


def _from(graph: onnx.GraphProto, ids: str) -> list[onnx.NodeProto]:
    """The nodes from token ids to the embedding."""
    return alive([node for node in graph.node if ids not in node.output], {EMBED})


def _rows(
    folder: Path, nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], tokens: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """What some nodes of the graph in a folder make of all token ids, some at a time: the first
    one, and rows [some, hidden]. inputs: the ids; others are ones, of a mask."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    part = helper.make_graph(
        nodes,
        "embedding",
        [helper.make_tensor_value_info(x, TensorProto.INT64, ["rows", "tokens"]) for x in inputs],
        [helper.make_empty_tensor_value_info(EMBED)],
        tensors,
    )
    model.graph.CopyFrom(part)
    session = load(path, model.SerializeToString(), "CPUExecutionProvider")
    every = np.arange(tokens)[None]
    for start in range(0, tokens, _TOKENS):
        some = every[:, start : start + _TOKENS]
        fed = {name: np.ones_like(some) if name == MASK else some for name in inputs}
        yield start, session.run([EMBED], fed)[0][0]


def _levels(widened: Widened, hidden: int) -> Callable[[], Quantized] | None:
    """What the table's rows stand for: levels of its own, or the head's."""
    stored, name = widened.stored, "model.embed_tokens"
    if f"{name}.blocks" not in stored:
        head = next((node for node in widened.graph.node if node.name == "lm_head"), None)
        return widened.quantized.get(head.input[1]) if head else None

    def read() -> Quantized:
        packed, scales = stored(f"{name}.blocks"), stored(f"{name}.scales")
        zeros = stored(f"{name}.zeros") if f"{name}.zeros" in stored else None
        said = {"bits": 8 * packed.shape[1] // (scales.shape[1] * _BLOCK), "block_size": _BLOCK}
        return replace(of_gather_block_quantized(said, packed, scales, zeros), columns=hidden)

    return read
