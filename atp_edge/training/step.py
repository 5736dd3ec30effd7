"""The gradients of one step: of its parts, one after another, on this rank and on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.importance import importance_of, scored
from atp_edge.losses import distilled_loss, language_loss
from atp_edge.run import ranks
from atp_edge.training.captured import StepGraphs
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
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Backward through a step's parts, their gradients added; returns the text's own cross-entropy,
    on the device: the host reads once a step, at its end.

    loss_of: (what is minimized, the cross-entropy), means over the labelled tokens of blocks.
    beside: a term of the step's loss that no text enters. retain_graph: what the parts have in
    common is gone through again. graphs: replay what it captured of parts that nothing is beside
    and that have nothing in common. The gradients are this rank's alone; the cross-entropy is of
    all ranks.
    """
    plain = torch.zeros((), device=accelerator.device)
    if graphs is not None and beside is None and not retain_graph:

        def run(blocks: Blocks, share: float | Tensor) -> Tensor:
            return _backward(Part(blocks=blocks, share=share), loss_of, accelerator)

        for part in parts:
            plain += graphs.gradients(part.blocks, float(part.share), run)
        ranks.add_up([plain])
        return plain
    *others, last = parts
    for part in others:
        plain += _backward(part, loss_of, accelerator, retain_graph=True)
    plain += _backward(last, loss_of, accelerator, beside=beside, retain_graph=retain_graph)
    ranks.add_up([plain])
    return plain


def add_decision_gradients(
    model: PeftModel,
    teacher: nn.Module | None,
    parts: Iterable[Part],
    config: Config,
    accelerator: Accelerator,
    *,
    share: float,
    penalty: Tensor | None,
    followed: FeasibleDecisions | None,
) -> tuple[list[Tensor], Tensor]:
    """Adds the gradient of a share of a batch's loss to the decision's; returns the importance to
    the batch, [size] a site (empty where it is not followed), and its cross-entropy.

    penalty: beside the last batch; the decision's own graph is gone through again until then.
    Without the distance to the teacher's layers: importance is in units of the prediction loss.
    """

    def loss_of(blocks: Blocks) -> tuple[Tensor, Tensor]:
        loss, plain = step_loss(model, teacher, blocks, config, layers=False)
        return share * loss, plain

    scoring: AbstractContextManager[list[Tensor]] = (
        scored(model, followed) if followed else nullcontext([])
    )
    with scoring as scores:
        plain = add_gradients(
            parts, loss_of, accelerator, beside=penalty, retain_graph=penalty is None
        )
    ranks.add_up(scores)
    more = config.train.batch_blocks
    found = importance_of(scores, blocks=more, a_batch=more)
    # Gradients, and with them the scores, are of the share alone.
    return [x / max(share, 1e-9) for x in found] if share < 1 else found, plain


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
