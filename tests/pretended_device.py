"""A device that is pretended, to count on a CPU how often the host would wait for one.

What is `put` there, what is made of it, and what is sent by `to` or made with `device=` lies on it.
A read is whatever would give the host a value of it: numbers, lists, `cpu()`, and operators whose
results have a size that depends on values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = frozenset({
    "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
})  # fmt: skip

HOST = "cpu"
"""By its name alone: torch.device("cpu") stands for the device that is pretended."""
MAKERS = {"tensor", "as_tensor", "from_numpy", "frombuffer"}
"""What makes tensors of the host's values, and is no operator."""


class Device:
    """What lies on it, and the reads so far, by the operator's name."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self._there: set[int] = set()

    def put(self, tensors: Iterable[Tensor]) -> None:
        self._there.update(_storage(tensor) for tensor in tensors)

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _storage(value) in self._there

    def settle(self, made: Any, *, there: bool) -> None:
        """Storages are used again: where each lies is said anew by who made it."""
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                (self._there.add if there else self._there.discard)(_storage(tensor))

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """The reads inside."""
        self.reads = []
        with _Operators(self), _Functions(self):
            yield self.reads


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Operators(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        there = any(self.device.has(value) for value in tree_leaves((args, kwargs)))
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_bools = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if there and (name in READS or by_bools):
            self.device.reads.append(name)
        made = func(*args, **(kwargs or {}))
        # What is written into stays where it lies, whatever the number that is written.
        self.device.settle(made, there=self.device.has(args[0]) if name[-1] == "_" else there)
        return made


class _Functions(TorchFunctionMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "numpy") and self.device.has(args[0]):
            self.device.reads.append(name)
            made = func(args[0].detach().clone(), *args[1:], **kwargs)
            self.device.settle(made, there=False)
            return made
        if name in MAKERS and kwargs.get("device") in (None, HOST):
            made = func(*args, **kwargs)
            self.device.settle(made, there=any(self.device.has(a) for a in tree_leaves(args)))
            return made
        sent = name == "to" and any(isinstance(a, (torch.device, str)) for a in args[1:])
        made = func(*args, **kwargs)
        if sent and not self.device.has(made):
            made = made.clone()
        if sent or kwargs.get("device") is not None:
            self.device.settle(made, there=True)
        return made
