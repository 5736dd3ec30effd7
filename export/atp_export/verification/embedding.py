"""The embedding's table as a graph computes it, where no tensor of the graph is it.

Rows of levels that are gathered first and dequantized by arithmetic then are nodes like others in
the fp32 form. For what asks for the whole table, every token is fed to them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from atp_export.runtime.session import load
from atp_export.verification.blocks import Quantized, of_gather_block_quantized
from atp_export.verification.widen import Widened, alive

EMBED, TABLE = "embed", "embed.table"
_DATA = "embed.data"
_TOKENS, _BLOCK = 4096, 32


def with_table(widened: Widened, tokens: int) -> Widened:
    """The same, its graph (not its file) reading the embedding of a vocabulary from a tensor."""
    graph = widened.graph
    names = {tensor.name for tensor in graph.initializer}
    node = next((node for node in graph.node if EMBED in node.output), None)
    if node is None or (node.op_type == "Gather" and node.input[0] in names):
        return widened
    path = widened.folder / _DATA
    table = _table(widened.folder, tokens)
    path.write_bytes(table.tobytes())
    tabled = onnx.GraphProto()
    tabled.CopyFrom(graph)
    gather = helper.make_node("Gather", [TABLE, "input_ids"], [EMBED], name=EMBED)
    nodes = [gather if EMBED in node.output else node for node in graph.node]
    del tabled.node[:]
    tabled.node.extend(alive(nodes, {value.name for value in graph.output}))
    proto = TensorProto(name=TABLE, dims=table.shape, data_type=TensorProto.FLOAT)
    refer(proto, _DATA, 0, table.nbytes)
    tabled.initializer.append(proto)
    levels = _levels(widened, table.shape[1])
    return replace(
        widened,
        graph=tabled,
        quantized={**widened.quantized, **({TABLE: levels} if levels else {})},
    )


def refer(proto: TensorProto, file: str, offset: int, length: int) -> None:
    """Let a tensor lie in a file beside the graph."""
    proto.ClearField("raw_data")
    proto.ClearField("external_data")
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def _table(folder: Path, tokens: int) -> NDArray[np.float32]:
    """[tokens, hidden] of the graph in a folder."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = alive(list(model.graph.node), {EMBED})
    read = {name for node in nodes for name in node.input}
    for field in (model.graph.node, model.graph.output):
        del field[:]
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_empty_tensor_value_info(EMBED))
    for kept in (model.graph.input, model.graph.initializer):
        wanted = [value for value in kept if value.name in read]
        del kept[:]
        kept.extend(wanted)
    session = load(path, model.SerializeToString(), "CPUExecutionProvider")
    # Flavour `ort` moves tokens by the mask: without padding, to where they are.
    names = {value.name for value in model.graph.input}
    ids = np.arange(tokens)[None]
    parts = []
    for start in range(0, tokens, _TOKENS):
        part = ids[:, start : start + _TOKENS]
        feed = {"input_ids": part, "attention_mask": np.ones_like(part)}
        given = {name: value for name, value in feed.items() if name in names}
        parts.append(session.run([EMBED], given)[0][0])
    return np.concatenate(parts)


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
