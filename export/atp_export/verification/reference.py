"""A PyTorch model that holds the tensors of an exported file: what its logits must be."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

Floats = NDArray[np.float32]


class Reference:
    """The architecture of `model` with other parameters and rotary tables; `model` stays as it is.

    state: parameters by name, tied ones each by its own. cos, sin: [positions, head_dim / 2].
    """

    def __init__(self, model: Any, state: Mapping[str, Tensor], cos: Tensor, sin: Tensor) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.state = {name: tensor.to(device) for name, tensor in state.items()}
        self.tables = tuple(torch.cat([half, half], -1).to(device) for half in (cos, sin))

    def parameters(self) -> Any:
        return self.model.parameters()

    def double(self) -> Reference:
        """The same in float64."""
        state = {name: tensor.double() for name, tensor in self.state.items()}
        halves = (table[:, : table.shape[1] // 2].double() for table in self.tables)
        return Reference(copy.deepcopy(self.model).double(), state, *halves)

    def __call__(self, ids: Tensor, **options: Any) -> Any:
        """The model's output for ids [B, T]."""
        hook = self.model.model.rotary_emb.register_forward_hook(self._turns, with_kwargs=True)
        try:
            return functional_call(
                self.model,
                self.state,
                (ids,),
                options | {"use_cache": False},
                tie_weights=False,
            )
        finally:
            hook.remove()

    def _turns(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        return tuple(table[positions] for table in self.tables)

    @torch.no_grad()
    def logits(self, text: Sequence[int], positions: Sequence[int]) -> Floats:
        """Logits [len(positions), V] of one text."""
        device = next(self.parameters()).device
        kept = torch.tensor(list(positions), device=device)
        output = self(torch.tensor([list(text)], device=device), logits_to_keep=kept)
        logits: Floats = output.logits[0].float().cpu().numpy()
        return logits
