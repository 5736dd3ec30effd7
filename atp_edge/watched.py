"""A decoder's pass over text for the sake of hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def read_under(hooks: Iterable[RemovableHandle], model: PreTrainedModel, *batches: Tensor) -> None:
    """Run the decoder over batches [B, T] without its vocabulary projection, for no logits are
    wanted; the hooks are removed after it, whatever happens."""
    decoder: Any = model.get_submodule("model")
    try:
        for ids in batches:
            decoder(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
