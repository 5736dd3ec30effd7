"""A run of layers of an exported model as a model of its own, so that a proof holds no more.

Embedding, layers `first` to `last` and the head: its graph is cut from the exported one, node by
node, and reads the exported file's own bytes; its PyTorch model holds the same layers of the
checkpoint. What crosses from one layer to the next is the residual stream, or two values that make
it as their sum; so the excerpt's first layer is given the embedding (and nothing to add to it), and
the last norm reads what its last layer leaves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, helper
from transformers import PreTrainedModel

from atp_edge.model.loading import CONFIG, load_config, tensor_files
from atp_edge.model.narrow import build_model
from atp_edge.model.stream import fill, reader_of, without_weights
from atp_export.verification.embedding import EMBED
from atp_export.verification.widen import alive

_LAYER = re.compile(r"\bmodel\.layers\.(\d+)\.")
_CACHE = re.compile(r"^(past_key_values|present)\.(\d+)\.")
_NO_MORE = "excerpt.nothing_more"
_TAIL = "final_norm"


def excerpt_graph(folder: Path, out: Path, layers: range) -> Path:
    """Write out/model.onnx of some layers of folder/model.onnx; its data is a link to the folder's.

    Raises ValueError for a graph whose layers cannot be told apart.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    spans = _spans(graph.node)
    if not set(layers) <= set(range(len(spans) - 2)):
        raise ValueError(f"{folder / 'model.onnx'} has {len(spans) - 2} layers, not {layers}")
    before, tail = spans[0], spans[-1]
    kept = [node for index in layers for node in spans[1 + index]]
    streams = _Streams(graph, spans)
    entry, start = streams.across(layers.start), streams.across(0)
    leaving, end = streams.across(layers.stop), streams.across(len(spans) - 2)
    if len(start) != 1 or len(entry) > 2 or len(leaving) != len(end):
        raise ValueError(
            f"{folder / 'model.onnx'}: {len(entry)} values enter layer {layers.start}; expected "
            "the residual stream, or two values that make it"
        )
    renamed = dict(zip(end, leaving, strict=True)) | dict(zip(entry, start, strict=False))
    nothing: list[NodeProto] = []
    if len(entry) == 2:
        renamed[entry[1]] = _NO_MORE
        nothing = [helper.make_node("Sub", [start[0], start[0]], [_NO_MORE], name=_NO_MORE)]
    nodes = [*before, *nothing, *(_reading(node, renamed) for node in (*kept, *tail))]
    outputs = {value.name for value in graph.output} & {o for node in nodes for o in node.output}
    _replace(graph, alive(nodes, outputs), layers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    for path in folder.iterdir():
        if path.name != "model.onnx":
            (out / path.name).symlink_to(path.resolve())
    return out


def _spans(nodes: Sequence[NodeProto]) -> list[list[NodeProto]]:
    """The nodes before the first layer, of every layer, and after the last. A graph is written in
    its order; a node that names no layer belongs to the next one that does."""
    layers = 1 + max((int(m[1]) for node in nodes if (m := _LAYER.search(node.name))), default=-1)
    spans: list[list[NodeProto]] = [[] for _ in range(layers + 2)]
    owner = layers + 1
    for node in reversed(nodes):
        if found := _LAYER.search(node.name):
            owner = 1 + int(found[1])
        elif node.name.startswith(_TAIL):
            owner = layers + 1
        elif node.name.startswith(EMBED):
            owner = 0
        spans[owner].insert(0, node)
    return spans


class _Streams:
    """Which values that follow from the embedding cross from layer to layer."""

    def __init__(self, graph: onnx.GraphProto, spans: Sequence[Sequence[NodeProto]]) -> None:
        self.spans = spans
        made = {name for node in spans[0] for name in node.output}
        # What layers read of the nodes before them, and of which the last one is the embedding.
        later = (node for span in spans[1:] for node in span)
        read = [name for node in later for name in node.input if name in made]
        embedded = self._embedding(read)
        self.follows = {embedded}
        self.at = {embedded: 0}
        for index, span in enumerate(spans[1:], 1):
            for node in span:
                if self.follows.intersection(node.input):
                    self.follows.update(node.output)
                    self.at |= dict.fromkeys(node.output, index)

    def _embedding(self, read: Sequence[str]) -> str:
        follows = {EMBED}
        for node in self.spans[0]:
            if follows.intersection(node.input):
                follows.update(node.output)
        found = [name for name in dict.fromkeys(read) if name in follows]
        if len(found) != 1:
            raise ValueError(f"the first layer reads {found}: expected the embedding alone")
        return found[0]

    def across(self, layer: int) -> list[str]:
        """What is made before a layer, and read in it or after it; in the order it is made."""
        later = {name for span in self.spans[1 + layer :] for node in span for name in node.input}
        return [name for name, at in self.at.items() if at <= layer and name in later]


def _reading(node: NodeProto, renamed: dict[str, str]) -> NodeProto:
    changed = NodeProto()
    changed.CopyFrom(node)
    changed.input[:] = [renamed.get(name, name) for name in node.input]
    return changed


def _replace(graph: onnx.GraphProto, nodes: Sequence[NodeProto], layers: range) -> None:
    """Let the graph be these nodes and what they read, its layers and caches counted from 0."""
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    inputs = [v for v in graph.input if v.name in read or not _CACHE.match(v.name)]
    outputs = [v for v in graph.output if v.name in made]
    tensors = [t for t in graph.initializer if t.name in read]
    caches = sorted({int(m[2]) for v in inputs if (m := _CACHE.match(v.name))})
    places = {cache: place for place, cache in enumerate(caches)}

    def said(name: str) -> str:
        counted = _LAYER.sub(lambda m: f"model.layers.{int(m[1]) - layers.start}.", name)
        return _CACHE.sub(lambda m: f"{m[1]}.{places[int(m[2])]}.", counted)

    for node in nodes:
        node.name = said(node.name)
        node.input[:] = [said(name) for name in node.input]
        node.output[:] = [said(name) for name in node.output]
    for value in (*inputs, *outputs, *tensors):
        value.name = said(value.name)
    new = helper.make_graph(list(nodes), graph.name, inputs, outputs, tensors)
    graph.CopyFrom(new)


def excerpt_model(checkpoint: Path, layers: range) -> PreTrainedModel:
    """The same layers of a checkpoint, with its embedding and head, in fp32."""
    said = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    config = type(load_config(checkpoint)).from_dict(excerpt_config(said, layers))
    with without_weights():
        model = build_model(config, torch.float32)
    model.tie_weights()
    read = reader_of(tensor_files(checkpoint))

    def whole(name: str) -> torch.Tensor:
        there = re.sub(r"\blayers\.(\d+)\.", lambda m: f"layers.{int(m[1]) + layers.start}.", name)
        return read(there).float()

    fill(model, [name for name, _ in model.named_parameters()], whole)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def excerpt_config(said: dict[str, Any], layers: range) -> dict[str, Any]:
    """config.json of some of a model's layers: what it says layer by layer is cut to them."""
    count, places = said["num_hidden_layers"], slice(layers.start, layers.stop)
    cut = {
        key: value[places] if isinstance(value, list) and len(value) == count else value
        for key, value in said.items()
    }
    if widths := said.get("per_layer_config"):
        # transformers pads the layers' numbers: `05`.
        of_layer = {int(index): own for index, own in widths.items()}
        cut["per_layer_config"] = {str(i): of_layer[index] for i, index in enumerate(layers)}
    return cut | {"num_hidden_layers": len(layers)}
