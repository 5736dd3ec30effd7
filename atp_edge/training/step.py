"""The gradients of one step: of its parts, one after another, on this rank and on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.losses import distilled_loss, language_loss
from atp_edge.run import ranks
from atp_edge.training.checkpointing import checkpointed
from atp_edge.training.stream import Part


def step_loss(
    model: PeftModel,
    teacher: nn.Module | None,
    batch: Blocks,
    config: Config,
    *,
    layers: bool = True,
) -> tuple[Tensor, Tensor]:
    """(what a step minimizes, the text's own cross-entropy): with a teacher, distilled; `layers`:
    also by the distance to its layers, if the settings weigh it."""
    with checkpointed(model):
        if teacher is None:
            loss = language_loss(model, batch)
            return loss, loss.detach()
        settings = config.recovery
        hidden = settings.distill_hidden if layers else 0.0
        return distilled_loss(model, teacher, batch, settings.distill, hidden)


def add_gradients(
    parts: Iterable[Part],
    loss_of: Callable[[Blocks], tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    beside: Tensor | None = None,
    retain_graph: bool = False,
) -> float:
    """Backward through a step's parts, their gradients added; returns the text's own cross-entropy.

    loss_of: (what is minimized, the cross-entropy), means over the labelled tokens of blocks.
    beside: a term of the step's loss that no text enters. retain_graph: what the parts have in
    common is gone through again. The gradients are this rank's alone; the cross-entropy is of all
    ranks.
    """
    plain = torch.zeros((), device=accelerator.device)
    *others, last = parts
    for part in others:
        plain += _backward(part, loss_of, accelerator, retain_graph=True)
    plain += _backward(last, loss_of, accelerator, beside=beside, retain_graph=retain_graph)
    ranks.add_up([plain])
    return float(plain)


def _backward(
    part: Part,
    loss_of: Callable[[Blocks], tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    beside: Tensor | None = None,
    retain_graph: bool = False,
) -> Tensor:
    """retain_graph: for what the parts have in common, the decision's own graph."""
    with accelerator.autocast():
        loss, plain = loss_of(part.blocks)
    loss = part.share * loss
    if beside is not None:
        loss = loss + beside / ranks.size()
    accelerator.backward(loss, retain_graph=retain_graph)
    return part.share * plain
