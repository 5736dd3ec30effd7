"""What the projections of a site share: one read of x, and what is made of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from atp_kernels import dense_weight
from torch import Tensor


class SharedInput:
    """Projections that read one x: the first one asked computes all, the others take theirs."""

    def __init__(self) -> None:
        # (x, what its other readers have yet to take)
        self._left: tuple[Tensor, dict[str, Tensor]] | None = None

    def take(self, name: str, x: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]) -> Tensor:
        """The output of projection `name` for x; compute: x -> the outputs of all, by name."""
        if self._left is None or self._left[0] is not x or name not in self._left[1]:
            self._left = x, compute(x)
        found = self._left[1].pop(name)
        if not self._left[1]:
            self._left = None
        return found


class WeightCache:
    """What is made of frozen weights, in the type to compute in; kept until one is written to.

    keeps: off, it is made anew each time, of weights that are there only while they are used.
    """

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self._made: dict[str, tuple[Any, Tensor]] = {}

    def of(
        self, name: str, weights: Sequence[Tensor], make: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        """make(weights), from the cache where it stands.

        A weight that is trained is gone through anew, for its gradient's sake. A 4-bit one is
        dequantized first.
        """
        if any(weight.requires_grad for weight in weights):
            return make(list(weights))
        device = weights[0].device.type
        on = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if on else None
        key = (kind, *((weight.data_ptr(), weight._version) for weight in weights))
        found = self._made.get(name)
        if found is None or found[0] != key:
            # What is made in inference mode could not be trained through later.
            with torch.inference_mode(False):
                made = make([dense_weight(weight) for weight in weights]).to(kind)
            found = key, made
            if self.keeps:
                self._made[name] = found
        return found[1]
