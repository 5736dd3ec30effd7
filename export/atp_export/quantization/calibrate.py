"""What the matrices of a checkpoint read on calibration text: the grams that GPTQ rounds by.

A token counts by how much the loss heeds what the matrix makes of it (GuidedQuant, arXiv
2505.07004, section 3.2, one group of channels). Were all tokens equal, a block's first would rule:
its activations are a hundred times the others' (massive activations, arXiv 2402.17762), and their
exact values hardly matter.

The model goes by layer by layer, forwards over all blocks and then backwards, each layer computed
again for its gradients: one layer's weights and grams are held at a time. What enters each layer,
and the finished grams, wait in files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.losses import scaled
from atp_edge.model.checkpoint import load_narrow_parts
from atp_edge.model.families import PARTS, Projection, check_reads, longest_text, scales_of
from atp_edge.model.hooks import into_layers, removed_after
from atp_edge.model.storage import EMBEDDING, HEAD
from atp_edge.model.stream import Read, drop, fill

# The first of several projections that read one input, by the others.
BESIDE: dict[str, Projection] = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Grams(Mapping[str, Tensor]):
    """Grams by the name of the module that reads; in files of a folder, if there is one."""

    def __init__(self, scratch: Path | None) -> None:
        self.scratch = scratch
        self._held: dict[str, Tensor] = {}

    def keep(self, name: str, gram: Tensor) -> None:
        """Note a gram, beside those of this name that were noted before."""
        if name in self._held:
            self._held[name] += gram
        elif self.scratch is None:
            self._held[name] = gram
        else:
            self._held[name] = _tensor_in(self.scratch / f"{name}.gram", gram.shape)
            self._held[name].copy_(gram)

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def input_grams(checkpoint: Path, ids: Tensor, scratch: Path | None = None) -> Grams:
    """X^T diag(w) X [in, in] over token blocks [N, T], by the name of the module that reads X (the
    first of several), in fp32. w: of every token, the squared size of d loss / d output, summed
    over the projections that read X. Under lm_head what the vocabulary head reads, and under
    model.embed_tokens G^T G, G [T, in] being d loss / d embeddings' output, which an error in a
    token's row meets. Where both are one matrix, lm_head holds the sum.

    scratch: a folder for what waits, which must outlive the grams: 4 bytes times K^2 a matrix, and
    N T H a layer. Without one it waits in memory. Raises ValueError when there are no blocks, and
    for longer ones than the model reads.
    """
    if not len(ids):
        raise ValueError("there is no block to calibrate on: give longer documents or more of them")
    model, read = load_narrow_parts(checkpoint)
    check_reads(longest_text(model.config), ids.shape[1], "a block of text", "take shorter blocks")
    model.requires_grad_(False)
    scales = scales_of(model.config)
    grams = Grams(scratch)
    blocks = [block[None] for block in ids]
    layers: Any = model.get_submodule("model.layers")
    streams = _streams((len(layers) + 1, *ids.shape, model.config.hidden_size), scratch)
    with (
        torch.no_grad(),
        _holding(model, "model.embed_tokens", read),
        _holding(model, "model.norm", read),
    ):
        for b, block in enumerate(blocks):
            stream, calls = into_layers(model, block)
            streams[0][b] = stream[0]
    for i in range(len(layers)):
        with _holding(model, f"model.layers.{i}", read) as layer, torch.no_grad():
            for b in range(len(blocks)):
                streams[i + 1][b] = layer(streams[i][b][None], **calls[i])[0]
    gradients = _of_the_head(model, read, streams[-1], blocks, grams)
    for i in reversed(range(len(layers))):
        gradients = _of_a_layer(model, read, i, streams[i], calls[i], gradients, grams)
    # What enters the layers is a row times the family's factor, and so is an error in it.
    table = HEAD if model.config.tie_word_embeddings else EMBEDDING
    for gradient in gradients:
        grams.keep(table, scales.embedding**2 * (gradient.T @ gradient))
    return grams


def _of_the_head(
    model: PreTrainedModel, read: Read, streams: Tensor, blocks: list[Tensor], grams: Grams
) -> list[Tensor]:
    """d loss / d what leaves the last layer, a block each; the head's gram."""
    gradients: list[Tensor] = []
    found: dict[str, Tensor] = {}
    scales = scales_of(model.config)
    with (
        _holding(model, "model.norm", read) as norm,
        _holding(model, "lm_head", read) as head,
        removed_after([_watch(head, HEAD, found)]),
    ):
        for b, block in enumerate(blocks):
            stream = streams[b][None].clone().requires_grad_()
            logits = scaled(head(norm(stream)), scales)
            model.loss_function(
                logits=logits, labels=block, vocab_size=model.config.vocab_size
            ).backward()
            gradients.append(_gradient(stream))
    grams.keep(HEAD, found[HEAD])
    return gradients


def _of_a_layer(
    model: PreTrainedModel,
    read: Read,
    index: int,
    streams: Tensor,
    call: dict[str, Any],
    gradients: list[Tensor],
    grams: Grams,
) -> list[Tensor]:
    """d loss / d what enters a layer, from that of what leaves it, a block each; its grams."""
    path, entered = f"model.layers.{index}", list[Tensor]()
    found: dict[str, Tensor] = {}
    with _holding(model, path, read) as layer:
        hooks = []
        for below, module in layer.named_modules():
            parent, _, own = below.rpartition(".")
            if own in PARTS:
                name = f"{path}.{parent}.{BESIDE.get(own, own)}"
                hooks.append(_watch(module, name, found))
        with removed_after(hooks):
            for b, gradient in enumerate(gradients):
                stream = streams[b][None].clone().requires_grad_()
                layer(stream, **call).backward(gradient[None])
                entered.append(_gradient(stream))
    for name, gram in found.items():
        grams.keep(name, gram)
    return entered


def _watch(module: nn.Module, name: str, found: dict[str, Tensor]) -> Any:
    """Sum up what a module reads, by the size of its output's gradient."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            weighted = gradient.flatten(0, -2).square().sum(-1, keepdim=True)
            gram = x.T @ (weighted * x)
            found[name] = found[name].add_(gram) if name in found else gram

        output.register_hook(add)

    return module.register_forward_hook(hook)


def _gradient(stream: Tensor) -> Tensor:
    assert stream.grad is not None
    return stream.grad[0]


@contextmanager
def _holding(model: PreTrainedModel, path: str, read: Read) -> Iterator[Any]:
    """A part of a model with its weights, read from the checkpoint for as long as it is used."""
    part = model.get_submodule(path)
    names = [name for name, _ in part.named_parameters()]
    fill(part, names, lambda name: read(f"{path}.{name}").float())
    try:
        yield part.requires_grad_(False)
    finally:
        drop(part)


def _streams(shape: tuple[int, ...], scratch: Path | None) -> Tensor:
    return torch.empty(shape) if scratch is None else _tensor_in(scratch / "streams", shape)


def _tensor_in(path: Path, shape: Any) -> Tensor:
    """An fp32 tensor whose values lie in a file."""
    held: Any = np.memmap(path, dtype=np.float32, mode="w+", shape=tuple(shape))
    return torch.from_numpy(held)
