"""The pruning decision beside an optimizer of one's own: in a plain accelerate loop, without a run.

It wraps a peft model whose LoRA lies on every projection of the decoder. Call `step` every few
optimizer steps with the loss of text that the optimizer does not see; then `freeze` and `narrow`.
The teacher, the repair and the tuned kept weights of a run are not here: what it recovers is what
LoRA alone recovers (docs/recovery.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor

from atp_edge.config import WidthsPolicy
from atp_edge.decision.budget import budget_penalty, feasible_decisions, parse_budget
from atp_edge.decision.generator import DecisionGenerator, decide
from atp_edge.decision.importance import importance_of, mean_importance, scored, starting_logits
from atp_edge.decision.projection import project
from atp_edge.decision.regularizer import proximal_step
from atp_edge.masking.apply import grown, set_decision
from atp_edge.masking.fused_layers import fuse_layers
from atp_edge.masking.lora import MaskedLoraLinear, note_structures
from atp_edge.model.families import model_shape, module_path
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.plan import Plan, plan_of
from atp_edge.model.structures import Masks

Loss = Callable[[], Tensor]
TEMPERATURE, PENALTY, STRENGTH = 0.4, 5.0, 10.0


class DecisionLearner:
    """What stays of every layer, learned while one's own loop tunes the LoRA.

    scoring: losses, one a batch, that say where the decision starts. budget: `params=SHARE` or
    `model-params=SHARE`. Raises ValueError for a model or a budget that it cannot be learned on.
    """

    def __init__(
        self,
        model: PeftModel,
        scoring: Sequence[Loss],
        accelerator: Accelerator,
        *,
        budget: str = "params=0.6",
        widths: WidthsPolicy = "per-layer",
        width_multiple: int = 32,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        wanted = parse_budget(budget)
        if wanted.kind == "bytes":
            raise ValueError(f"budget {budget!r}: of a run alone; take params= or model-params=")
        self.model, self.accelerator = _masked(model), accelerator
        self.shape = model_shape(model.get_base_model().config)
        self.feasible = feasible_decisions(
            self.shape, wanted, widths=widths, width_multiple=width_multiple
        )
        self.importance, self.seen = self._scored(scoring), len(scoring)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = starting_logits(self.importance, self.feasible)
            self.generator = DecisionGenerator(self.feasible.sites, start).to(accelerator.device)
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=lr)
        fuse_layers(self.model)
        self.masks = self._now()
        set_decision(self.model, self.masks, "base")

    @property
    def kept_share(self) -> float:
        """Of the decoder's parameters, under the decision held."""
        return float(self.feasible.kept_share([mask.float() for mask in self.masks]))

    def step(self, loss: Loss) -> float:
        """Move the decision by the loss of one batch, and hold it; returns that loss."""
        decision = decide(self.generator(), self.feasible, temperature=TEMPERATURE, noise=None)
        with _frozen(self.model), scored(self.model, self.feasible) as scores:
            set_decision(self.model, decision.masks, "whole")
            task = loss()
            share = self.feasible.kept_share(decision.unprojected)
            penalty = budget_penalty(share, self.feasible.target_share, PENALTY)
            self.accelerator.backward(task + penalty)
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen += 1
        new = importance_of(scores, blocks=1)
        self.importance = mean_importance(self.importance, new, 1 / self.seen)
        self.generator.set_base(starting_logits(self.importance, self.feasible))
        self.masks = self._now()
        set_decision(self.model, self.masks, "base")
        return float(task.detach())

    def regularize(self, lr: float, progress: float) -> None:
        """Beside an optimizer step of this learning rate: shrink the LoRA of what is removed.

        progress: the share of the steps before the freeze that are done; the strength grows by it.
        """
        proximal_step(self.model, self.masks, STRENGTH * progress * lr)
        came = grown(self.model)
        if came is not None and bool(came):
            set_decision(self.model, self.masks, "base")

    def freeze(self) -> Plan:
        """The decision as a plan; the model then computes what the narrow one will."""
        self.masks = self._now()
        set_decision(self.model, self.masks, "whole")
        return plan_of(self.shape, self.masks.kept())

    def narrow(self) -> PeftModel:
        """A narrow copy with its LoRA, plain peft, to be tuned on or merged."""
        return narrow_peft(self.model, self.freeze())

    @torch.no_grad()
    def _now(self) -> Masks:
        masks = project(self.generator(), self.feasible).masks
        return Masks(mask.to(self.accelerator.device) for mask in masks)

    def _scored(self, losses: Sequence[Loss]) -> list[Tensor]:
        if not losses:
            raise ValueError("scoring holds no loss: give one or more, each of a batch of text")
        with scored(self.model, self.feasible) as scores:
            for loss in losses:
                loss().backward()
        self.model.zero_grad()
        return importance_of(scores, blocks=len(losses))


def _masked(model: PeftModel) -> PeftModel:
    """The model, its LoRA layers made such that carry a decision; nothing is computed otherwise."""
    base: Any = model.get_base_model()
    shape = model_shape(base.config)
    projections = (*shape.layout.attention, *shape.layout.mlp)
    for layer in range(len(shape.layers)):
        for projection in projections:
            path = module_path(layer, projection)
            module = base.get_submodule(path)
            if type(module) is PeftLoraLinear:
                module.__class__ = MaskedLoraLinear
            if not isinstance(module, MaskedLoraLinear) or not module.lora_alone:
                raise ValueError(
                    f"{path} is {type(module).__name__}: a decision needs peft's plain LoRA, on "
                    f"and not merged, named 'default', on each of {', '.join(projections)}"
                )
    note_structures(model, "groups")
    return model


@contextmanager
def _frozen(model: PeftModel) -> Any:
    """No parameter of the model takes a gradient inside."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
