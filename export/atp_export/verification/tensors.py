"""Tensors of an ONNX file, read where they lie: what is not asked for takes no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class Tensors:
    """The initializers of a graph by name, mapped from its folder's files, none written through.

    Raises ValueError for a tensor that is not there, or whose bytes are not.
    """

    def __init__(self, folder: Path, graph: onnx.GraphProto) -> None:
        self.folder = folder
        self.protos = {tensor.name: tensor for tensor in graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self.protos

    def kind(self, name: str) -> int:
        """The tensor's type, of onnx.TensorProto."""
        return int(self._proto(name).data_type)

    def place(self, name: str) -> tuple[str, ...] | bytes:
        """Where the tensor's bytes lie in the folder, or the bytes where they are in the graph."""
        proto = self._proto(name)
        if proto.data_location != TensorProto.EXTERNAL:
            return bytes(proto.raw_data)
        return tuple(f"{entry.key}={entry.value}" for entry in proto.external_data)

    def __call__(self, name: str) -> NDArray[Any]:
        """The tensor in its own type; 4-bit integers as ml_dtypes has them, a byte each."""
        proto = self._proto(name)
        dtype = helper.tensor_dtype_to_np_dtype(proto.data_type)
        if proto.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(proto).copy()
        raw = self._mapped(proto)
        if "int4" in dtype.name:
            inline = TensorProto(dims=proto.dims, data_type=proto.data_type, raw_data=raw.tobytes())
            return numpy_helper.to_array(inline)
        return raw.view(dtype).reshape(proto.dims)

    def _proto(self, name: str) -> onnx.TensorProto:
        if name not in self.protos:
            raise ValueError(f"{self.folder / 'model.onnx'} has no tensor {name!r}")
        return self.protos[name]

    def _mapped(self, proto: onnx.TensorProto) -> NDArray[np.uint8]:
        place = {entry.key: entry.value for entry in proto.external_data}
        path = self.folder / Path(place["location"]).name
        try:
            return np.memmap(
                path, mode="c", offset=int(place["offset"]), shape=(int(place["length"]),)
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not hold all of {proto.name!r}: {error}") from error


def widened(array: NDArray[Any]) -> NDArray[np.float32]:
    """The same values in fp32 (itself where it is that already)."""
    return np.asarray(array, np.float32)
