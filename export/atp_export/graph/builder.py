"""Nodes and weights of an ONNX model; weights go straight to the external data file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from atp_edge.model.storage import ALIGNMENT, INLINE_BYTES, Kind, Stored

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
}
STORED_TYPES: dict[Kind, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "uint8": TensorProto.UINT8,
}
DATA_FILE = "model.onnx.data"
# Opset 23 came with IR 11, of which nothing is used: 10 opens in runtimes that do not know 11.
_HIGHEST_IR = 10


class GraphBuilder:
    """Collects a graph; large tensors are written as they come, so that memory holds one at a time.

    Names of outputs are returned by `node`, so that code reads as the computation it builds.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.folder = folder
        self.data: BinaryIO = (folder / DATA_FILE).open("wb")
        self._counts: dict[str, int] = {}
        self._names: set[str] = set()

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        name: str | None = None,
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Add a node; returns its output's name, or a list of them when there are several."""
        label = name or f"{op}_{self._counts.setdefault(op, 0)}"
        self._counts[op] = self._counts.get(op, 0) + 1
        if isinstance(outputs, int):
            outputs = [f"{label}.{i}" for i in range(outputs)] if outputs > 1 else [label]
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=label, domain=domain, **attributes)
        )
        return outputs[0] if len(outputs) == 1 else list(outputs)

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor of the model, in the graph's type."""
        return self.tensor(name, tensor.to(self.dtype))

    def tensor(self, name: str, tensor: Tensor) -> str:
        """A tensor as it is; the small ones stay in the header."""
        return self.raw(name, ONNX_TYPES[tensor.dtype], tensor.shape, _bytes(tensor))

    def store(self, stored: Stored, values: NDArray[Any]) -> str:
        """A tensor that the model's storage describes, by its bytes."""
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        assert raw.nbytes == stored.nbytes, f"{stored} cannot hold {raw.nbytes} bytes"
        return self.raw(stored.name, STORED_TYPES[stored.kind], stored.dims, raw)

    def view(self, name: str, kind: int, shape: Sequence[int], of: str) -> str:
        """The bytes of another tensor under a name, a type and a shape of its own.

        In the file they are there once. A Reshape would do, but ONNX Runtime folds it into a copy.
        """
        (source,) = (t for t in self.initializers if t.name == of)
        proto = TensorProto()
        proto.CopyFrom(source)
        proto.name, proto.data_type, proto.dims[:] = name, kind, shape
        self.initializers.append(proto)
        self._names.add(name)
        return name

    def raw(self, name: str, kind: int, shape: Sequence[int], raw: NDArray[np.uint8]) -> str:
        """A tensor by its bytes: row-major, two 4-bit values a byte, the first one low."""
        proto = TensorProto(name=name, dims=shape, data_type=kind)
        if raw.nbytes <= INLINE_BYTES:
            proto.raw_data = raw.tobytes()
        else:
            self.data.write(b"\0" * (-self.data.tell() % ALIGNMENT))
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", DATA_FILE),
                ("offset", str(self.data.tell())),
                ("length", str(raw.nbytes)),
            ):
                proto.external_data.add(key=key, value=value)
            self.data.write(raw.data)
        self.initializers.append(proto)
        self._names.add(name)
        return name

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is there."""
        return name in self._names

    def constant(self, values: Sequence[int] | int) -> str:
        """An int64 constant, shared by all its readers."""
        label = f"const.{values}".replace(" ", "")
        if not self.has(label):
            self.tensor(label, torch.tensor(values, dtype=torch.int64))
        return label

    def input(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def optional_input(self, name: str, default: Tensor, shape: Sequence[str | int]) -> str:
        """An input that callers may leave out: an initializer of its name holds the default."""
        self.input(name, ONNX_TYPES[default.dtype], shape)
        return self.tensor(name, default)

    def output(self, name: str, kind: int, shape: Sequence[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def finish(self, *, opset: int, contrib: bool, metadata: dict[str, str]) -> Path:
        """Write model.onnx; the data file is complete before it."""
        self.data.close()
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, self.initializers
        )
        opsets = [helper.make_opsetid("", opset)]
        if contrib:
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        lowest = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            producer_name="atp-edge",
            ir_version=min(lowest, _HIGHEST_IR),
        )
        helper.set_model_props(model, metadata)
        path = self.folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The tensor's own memory (copied only when it is not contiguous)."""
    flat: NDArray[np.uint8] = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    )
    return flat
