"""From which position on logits are computed: a constant of the file, an input of our runtime.

A prefill needs the logits of its last position alone, a score those of every position. Written as
an optional input (an initializer of an input's name), every runtime would warn at every load, and
keep the slice. So the file holds a plain constant, 0, which optimizers remove with its slice, and
our runtime declares the input over it while loading: encoded protobuf messages put one after the
other are one message, their repeated fields joined (protobuf.dev, "Last One Wins"). No other copy
of the graph, and no onnx in the process.
"""

from __future__ import annotations

LOGITS_FROM = "logits_from"
_NAME = LOGITS_FROM.encode()
_INT64 = 7


def with_input(header: bytes) -> bytes:
    """A serialized ModelProto that takes `logits_from` [1] (int64) as an optional input.

    One that knows no such constant (another exporter's) is returned as it is.
    """
    if _NAME not in header:
        return header
    dims = _field(1, b"\x08\x01")  # dim { dim_value: 1 }
    tensor = b"\x08" + bytes([_INT64]) + _field(2, dims)  # elem_type, shape
    value = _field(1, _NAME) + _field(2, _field(1, tensor))  # name, type { tensor_type }
    return header + _field(7, _field(11, value))  # graph { input }


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message (number below 16, content below 128 bytes)."""
    return bytes([number << 3 | 2, len(content)]) + content
