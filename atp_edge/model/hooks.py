"""Hooks for the time of a pass over text, and no longer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


@contextmanager
def removed_after(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_under(hooks: Iterable[RemovableHandle], model: PreTrainedModel, *batches: Tensor) -> None:
    """Run the decoder over batches [B, T] without its vocabulary projection, for no logits are
    wanted; the hooks are removed after it."""
    decoder: Any = model.get_submodule("model")
    with removed_after(hooks):
        for ids in batches:
            decoder(input_ids=ids.to(model.device), use_cache=False)
