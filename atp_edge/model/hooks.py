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


def into_layers(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The stream [B, T, H] that enters the first layer, and how the decoder calls each of them:
    masks and positions, which families make in their own ways. No layer is computed.

    ids: [B, T], on the device that the model computes on (of one whose weights are read as they are
    needed, `model.device` does not tell).
    """
    decoder: Any = model.get_submodule("model")
    layers = decoder.layers
    streams: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def note(x: Tensor, **call: Any) -> Tensor:
        streams.append(x)
        calls.append(call)
        return x

    try:
        for layer in layers:
            layer.forward = note
        decoder(input_ids=ids, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return streams[0], calls
