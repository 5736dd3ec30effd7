"""Where the parameters of a model lie in the fp32 form of its graph.

By the names of nodes and tensors. That a node reads what its name says is no assumption of the
proof: the logits of the graph and of the model that holds these tensors show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx import NodeProto
from torch import Tensor

from atp_edge.model.storage import projections_named
from atp_export.verification.widen import Widened, attributes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCALE = "scale."
"""Of a head_dim: what attention scores are multiplied by, where the operator does not know it."""
_PACKED = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.(?:(?:qkv|q|k|v|o|gate|up|down)_?)+$")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Some rows of a tensor of the graph, once it is turned so that rows are outputs."""

    tensor: str
    turned: bool = False
    rows: slice = field(default_factory=lambda: slice(None))

    def of(self, whole: Any) -> Any:
        """The part [out, in] of the tensor, an array or torch's, without a copy."""
        return (whole.T if self.turned else whole)[self.rows]


def places_of(widened: Widened, parameters: Mapping[str, Tensor]) -> dict[str, Place]:
    """The places of parameters by their names in the model. A packed matrix has a bias for each of
    its projections where one has any: names of biases that the model lacks are among them."""
    names = {tensor.name for tensor in widened.graph.initializer}
    found = {name: Place(tensor=name) for name in parameters if name in names}
    nodes = {node.name: node for node in widened.graph.node}
    if "embed" in nodes and nodes["embed"].op_type == "Gather":
        found[EMBEDDING] = Place(tensor=nodes["embed"].input[0])
    if "lm_head" in nodes:
        found |= _matrix(nodes["lm_head"], [HEAD], parameters)
    for name, node in nodes.items():
        weights = weights_of(name)
        found |= _matrix(node, weights, parameters)
        if f"{name}.bias" in names:
            biases = (weight.replace(".weight", ".bias") for weight in weights)
            rows = zip(biases, rows_of(weights, parameters), strict=False)
            found |= {bias: Place(tensor=f"{name}.bias", rows=part) for bias, part in rows}
    return {name: place for name, place in found.items() if place.tensor in names}


def weights_of(name: str) -> list[str]:
    """The weights side by side in a projection's node: `model.layers.0.self_attn.q_k_v` -> those of
    q_proj, k_proj and v_proj. None where a node has another name."""
    if not _PACKED.match(name):
        return []
    return [f"{path}.weight" for path in projections_named(name)]


def _matrix(
    node: NodeProto, weights: list[str], parameters: Mapping[str, Tensor]
) -> dict[str, Place]:
    """The places of weights side by side in the matrix that a node multiplies with."""
    said = attributes(node)
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm") or len(node.input) < 2:
        return {}
    turned = not said.get("transB", 0)
    parts = zip(weights, rows_of(weights, parameters), strict=False)
    return {weight: Place(tensor=node.input[1], turned=turned, rows=rows) for weight, rows in parts}


def rows_of(weights: list[str], parameters: Mapping[str, Tensor]) -> Iterator[slice]:
    """Which rows each of several weights side by side has, up to one that the model lacks."""
    start = 0
    for weight in weights:
        if weight not in parameters:
            return
        yield slice(start, start + len(parameters[weight]))
        start += len(parameters[weight])
