"""bf16 in Triton's interpreter as a GPU has it.

numpy has no bf16: the interpreter keeps its bits in uint16, and then multiplies those as integers
(in `*` and in `tl.dot`) and rounds to it by cutting off. Here arithmetic on bf16 goes through
fp32, where products of two bf16 are exact, and rounds to nearest even. Sums of a dot are in fp32
as in the tensor cores; only their order differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _wide(handle: TensorHandle) -> TensorHandle:
    """bf16 -> fp32, exactly; another type as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(data: np.ndarray[Any, Any]) -> TensorHandle:
    """fp32 -> bf16, to nearest even. A NaN keeps a bit of its fraction."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(data), (bits >> 16) | 0x40, rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def patch() -> None:
    """Replaces three methods of the interpreter's builder, for the life of the process."""
    dot, cast, binary = (
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op,
    )  # fmt: skip

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        return dot(self, _wide(a), _wide(b), d, *options)

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            return _narrow(cast(self, src, tl.float32).data)
        return cast(self, _wide(src), dst_type)

    def binary_op(
        self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        return _narrow(op(_wide(lhs).data, _wide(rhs).data))

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
