"""A PyTorch model that holds the tensors of an exported file: what its logits must be."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from atp_edge.model.stream import streamed

Floats = NDArray[np.floating[Any]]


class Reference:
    """The architecture of `model` with other numbers in it; between calls the model is as it was.

    state: parameters by name, tied ones each by its own. tables: rotary tables (cos, sin), each
    [positions, pairs], by the name that layers call them by. scales: what attention scores are
    multiplied by, by head_dim, where the file has a tensor for it.
    """

    def __init__(
        self,
        model: Any,
        state: Mapping[str, Tensor],
        tables: Mapping[str, tuple[Tensor, Tensor]],
        scales: Mapping[int, float],
        device: torch.device | None = None,
    ) -> None:
        """device: the model's, where its own parameters do not tell."""
        device = device or next(model.parameters()).device
        self.model, self.scales, self.device = model, scales, device
        self.state = {name: tensor.to(device) for name, tensor in state.items()}
        self.tables = {
            name: tuple(torch.cat([half, half], -1).to(device) for half in halves)
            for name, halves in tables.items()
        }

    def parameters(self) -> Any:
        return self.model.parameters()

    def double(self) -> Reference:
        """The same in float64, a layer's numbers at a time: all of them would take twice what they
        take here, and the model's own, which they stand in for, as much again."""
        tables = {
            name: (cos[:, : cos.shape[1] // 2].double(), sin[:, : sin.shape[1] // 2].double())
            for name, (cos, sin) in self.tables.items()
        }
        empty = {id(p): nn.Parameter(p.detach().to("meta")) for p in self.model.parameters()}
        exact = copy.deepcopy(self.model, empty).double()
        streamed(exact, self.state.__getitem__, self.device)
        return Reference(exact, {}, tables, self.scales, self.device)

    def __call__(self, ids: Tensor, **options: Any) -> Any:
        """The model's output for ids [B, T]."""
        options["use_cache"] = False
        with self._other_numbers():
            return functional_call(self.model, self.state, (ids,), options, tie_weights=False)

    @contextmanager
    def _other_numbers(self) -> Iterator[None]:
        """Rotary tables and scales in place of the model's."""
        attentions = [layer.self_attn for layer in self.model.model.layers]
        own = [attention.scaling for attention in attentions]
        for attention in attentions:
            attention.scaling = self.scales.get(attention.head_dim, attention.scaling)
        rotary = self.model.model.rotary_emb
        hook = rotary.register_forward_hook(self._turns, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            for attention, scaling in zip(attentions, own, strict=True):
                attention.scaling = scaling

    def _turns(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        name = kwargs["layer_type"] if "layer_type" in kwargs else "".join(args[2:])
        # A table that no layer reads is not in the file.
        return tuple(t[positions] for t in self.tables[name]) if name in self.tables else output

    @torch.no_grad()
    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Floats:
        """Logits [len(positions), V] of one text, in fp32, or float64 as the model is."""
        kept = torch.tensor(list(positions), device=self.device)
        found = self(torch.tensor([list(text)], device=self.device), logits_to_keep=kept).logits[0]
        logits: Floats = found.to(torch.promote_types(found.dtype, torch.float32)).cpu().numpy()
        return logits
