"""First-order (Taylor) importance of every structure: from where the decision starts, and what it
follows, for every generator step measures it on the model as masked and tuned so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from atp_kernels import dense_weight
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.projection import project
from atp_edge.masking.lora import MaskedLoraLinear
from atp_edge.model.families import READER_OF, module_path
from atp_edge.model.hooks import removed_after
from atp_edge.model.sharded import keep_in_step
from atp_edge.model.structures import Site, by_structure, on_host
from atp_edge.run import ranks
from atp_edge.run.watched import counted

# A KV group's score sums over head_dim inputs of o_proj alone, though the group owns rows of q, k
# and v too, which no other structure shares; measured in docs/research/log.md. For RoPE pairs
# measured on a tiny byte model alone (there too).
ATTENTION_FACTOR = 5.0
# A mean over tokens of |z * dL/dz| is ruled by the many tokens that lose little; what a slim model
# loses in the end it loses on few, which late layers serve. Measured in docs/research/log.md.
POWER = 2


def taylor_importance(
    model: PreTrainedModel,
    blocks: Blocks,
    feasible: FeasibleDecisions,
    loss: Callable[[Blocks], Tensor],
) -> list[Tensor]:
    """Importance of every structure to the loss of blocks: [size] a site."""
    # Gradients of what the layers read are wanted, whether or not any weight has one.
    model.enable_input_require_grads()
    with scored(model, feasible) as scores:
        mine = range(ranks.rank(), len(blocks.input_ids), ranks.size())
        for i in counted(mine, "scoring"):
            loss(blocks.rows([i]).to(model.device)).backward()
    first = blocks.first(1).to(model.device)
    keep_in_step(model, len(mine), lambda: loss(first).backward())
    model.disable_input_require_grads()
    model.zero_grad()
    ranks.add_up(scores)
    return importance_of(scores, blocks=len(blocks.input_ids))


@contextmanager
def scored(model: nn.Module, feasible: FeasibleDecisions) -> Iterator[list[Tensor]]:
    """Sums over tokens of |z * dL/dz| to the power of `POWER`, of all backward passes inside:
    [size] a site.

    z is what o_proj or down_proj reads, before any mask; its gradient is that of the whole weight,
    so that removed structures are scored like kept ones; a token's inputs of one structure add up.
    The first-order change of the loss when an output appears or goes, without cancellation over
    tokens (the activation form of LLM-Pruner's group Taylor score, arXiv 2305.11627, eq. 5). A RoPE
    pair of `head-dims` also scores |q * dL/dq|, of both its dimensions together: what its scores of
    attention are worth.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    scores = [torch.zeros(site.size, device=base.device) for site in feasible.sites]
    hooks, sinks = [], []
    for site, score in zip(feasible.sites, scores, strict=True):
        watches = {str(READER_OF[site.kind]): _watch_inputs}
        if site.kind == "attention" and site.space == "head-dims":
            watches["q_proj"] = _watch_queries
        for name, watch in watches.items():
            module = base.get_submodule(module_path(site.layer, name))
            hooks.append(module.register_forward_hook(partial(watch, site, score)))
            if watch is _watch_inputs and isinstance(module, MaskedLoraLinear):
                module.score = score
                sinks.append(module)
    try:
        with removed_after(hooks):
            yield scores
    finally:
        for module in sinks:
            module.score = None


def importance_of(scores: list[Tensor], *, blocks: int, a_batch: int = 1) -> list[Tensor]:
    """The mean of what `scored` summed over blocks, by its power: [size] a site.

    a_batch: blocks whose mean each loss was, and each gradient so much smaller.
    """
    return [(score * a_batch**POWER / blocks).pow(1 / POWER) for score in on_host(scores)]


def mean_importance(seen: list[Tensor], new: list[Tensor], share: float) -> list[Tensor]:
    """The importance to all blocks, of which `new` saw this share and `seen` the others."""
    return [
        torch.lerp(a.pow(POWER), b.pow(POWER), share).pow(1 / POWER)
        for a, b in zip(seen, new, strict=True)
    ]


def _watch_inputs(
    site: Site, score: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    if getattr(module, "scores_itself", False):
        return
    z = inputs[0].detach()

    def add(gradient: Tensor) -> None:
        with torch.no_grad():
            taylor = (z.float() * _input_gradient(module, gradient).float()).abs().flatten(0, -2)
            a_token = by_structure(taylor, 1, site.size, site.space).sum(-1)  # [size, tokens]
            score.add_(a_token.pow(POWER).sum(1))

    output.register_hook(add)


def _watch_queries(
    site: Site, score: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    with torch.no_grad():
        q = _unmasked_output(module, inputs[0], output)

    def add(gradient: Tensor) -> None:
        with torch.no_grad():
            # [tokens, heads, 2, pairs]: RoPE's turn leaves the sum over a pair as it is.
            pairs = (q.float() * gradient.float()).flatten(0, -2).unflatten(1, (-1, 2, site.size))
            score.add_(pairs.sum(2).abs().sum(1).pow(POWER).sum(0))

    output.register_hook(add)


def _unmasked_output(module: Any, x: Tensor, output: Tensor) -> Tensor:
    """(W + s B A) x, which a mask has not touched; `output` where there is no LoRA."""
    if not isinstance(module, LoraLayer):
        return output
    a, b = module.lora_A["default"], module.lora_B["default"]
    whole: Tensor = module.get_base_layer()(x) + module.scaling["default"] * b(a(x))
    return whole


def _input_gradient(module: Any, gradient: Tensor) -> Tensor:
    """dL/dz [..., in] of (W + s B A) z from dL/dy [..., out]; of W z where there is no LoRA."""
    kind = gradient.dtype
    if not isinstance(module, LoraLayer):
        return gradient @ dense_weight(module.weight).to(kind)
    base = dense_weight(module.get_base_layer().weight).to(kind)
    a, b = (f["default"].weight.to(kind) for f in (module.lora_A, module.lora_B))
    return gradient @ base + module.scaling["default"] * ((gradient @ b) @ a)


def starting_logits(importance: list[Tensor], feasible: FeasibleDecisions) -> list[Tensor]:
    """Log importance per parameter, shifted so that zero is the border of the first decision."""
    density = [
        torch.log(
            (score * (ATTENTION_FACTOR if site.kind == "attention" else 1.0)).clamp_min(1e-20)
            / site.unit_parameters
        )
        for score, site in zip(importance, feasible.sites, strict=True)
    ]
    thresholds = project(density, feasible).thresholds
    return [x - threshold for x, threshold in zip(density, thresholds, strict=True)]
