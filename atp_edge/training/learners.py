"""The learners: LoRA and the decision in turn, then recovery under the frozen decision.

Everything drawn follows from the seed and the step alone, so that a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions, budget_penalty
from atp_edge.decision.generator import DecisionGenerator, decide
from atp_edge.decision.importance import mean_importance, starting_logits
from atp_edge.decision.projection import project
from atp_edge.decision.regularizer import group_lasso, proximal_step
from atp_edge.masking.apply import grown, restore_slots, set_decision, slots_of
from atp_edge.masking.fused_layers import fuse_layers
from atp_edge.model.structures import Masks
from atp_edge.reconstruction.repair import Repair
from atp_edge.run import ranks
from atp_edge.run.history import Phase, Record
from atp_edge.run.watched import underway
from atp_edge.training.checkpointing import enable_checkpointing
from atp_edge.training.measure import loss_of
from atp_edge.training.optimizer import TunedWeights, rate_of_step
from atp_edge.training.step import add_decision_gradients, add_gradients, step_loss
from atp_edge.training.stream import BatchStream, Part

GENERATOR_WARMUP = 10  # of its own steps


class Tuner:
    """Tunes LoRA and, with `retrain`, the projections' own weights; no decision is involved.

    Used for the dense baseline and for the recovery of the narrow model.
    """

    def __init__(
        self,
        model: PeftModel,
        train: Blocks,
        config: Config,
        accelerator: Accelerator,
        *,
        phase: Phase,
        first_step: int = 0,
        teacher: nn.Module | None = None,
        retrain: bool = False,
        validation: Blocks | None = None,
    ) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        self.phase, self.first_step, self.last_step = phase, first_step, config.steps
        self.rate, self.validation = 1.0, validation
        self.teacher = teacher
        self.stream = BatchStream(train, config, accelerator.device)
        self.tuned = TunedWeights(model, config, accelerator, retrain=retrain)
        self.graphs = self.tuned.graphs(self.last_step - self.first_step)
        if config.train.checkpointing == "true":
            enable_checkpointing(model)
        for each in (model, *([] if teacher is None else [teacher])):
            fuse_layers(each)

    def step(self, index: int) -> Record:
        rate = self.rate * rate_of_step(
            index - self.first_step,
            steps=self.last_step - self.first_step,
            warmup=self.config.train.warmup,
            decay=True,
        )
        plain = add_gradients(
            self.stream(index),
            lambda blocks: step_loss(self.model, self.teacher, blocks, self.config),
            self.accelerator,
            graphs=self.graphs,
        )
        self.tuned.step(rate)
        return Record(
            step=index,
            phase=self.phase,
            loss=float(plain),
            lr=rate * self.config.lora.lr,
            tokens=self.stream.tokens_until(index + 1),
        )

    def validate(self) -> float | None:
        if self.validation is None:
            return None
        with underway("validating", 1):
            return loss_of(self.model, self.validation, self.accelerator).mean

    def state_dict(self) -> dict[str, Any]:
        return self.tuned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuned.load_state_dict(state)


class JointLearner:
    """LoRA on the train split and the decision on the decision split, in turn (ATP, algorithm 1).

    Every `interval` steps the generator is updated under masks on the whole output, and a fresh
    decision is taken; LoRA steps hold it fixed, by default under masks on the frozen product alone.
    """

    phase: Phase = "control"
    first_step = 0
    rate = 1.0

    def __init__(
        self,
        model: PeftModel,
        generator: DecisionGenerator,
        feasible: FeasibleDecisions,
        train: Blocks,
        decision: Blocks,
        config: Config,
        accelerator: Accelerator,
        *,
        teacher: nn.Module | None = None,
        retrain: bool = False,
        importance: list[Tensor] | None = None,
        protected: Blocks | None = None,
    ) -> None:
        self.model, self.feasible, self.config = model, feasible, config
        self.importance = importance
        self.accelerator, self.teacher = accelerator, teacher
        self.last_step = config.control_steps
        self.generator = generator.to(accelerator.device)
        self.stream = BatchStream(train, config, accelerator.device)
        self.decision_stream = BatchStream(decision, config, accelerator.device)
        self.protected_stream = protected and BatchStream(protected, config, accelerator.device)
        self.tuned = TunedWeights(model, config, accelerator, retrain=retrain)
        settings = config.decision
        self.graphs = self.tuned.graphs(settings.interval if settings.learn else self.last_step)
        if config.train.checkpointing == "true":
            enable_checkpointing(model)
        for each in (model, *([] if teacher is None else [teacher])):
            fuse_layers(each)
        self.generator_optimizer = accelerator.prepare(
            torch.optim.AdamW(self.generator.parameters(), lr=config.decision.lr)
        )
        self.settled = self._without_noise()
        """The decision without noise: the one held, where nothing is sampled."""
        self._take(self.settled)
        self.repair: Repair | None = None
        """Moves along with the decision, where set."""

    @torch.no_grad()
    def _without_noise(self) -> Masks:
        masks = project(self.generator(), self.feasible).masks
        return _agreed(mask.to(self.accelerator.device) for mask in masks)

    def freeze(self) -> Masks:
        """The last decision, without noise: bool [size] a site. Evaluation and the end use it."""
        self._hold(self._without_noise())
        return self.masks

    def _hold(self, masks: Masks) -> None:
        if self.repair is not None:
            self.repair.move(masks)
        self._take(masks)

    def _take(self, masks: Masks) -> None:
        self.masks = masks
        self.kept_share = self.feasible.kept_share(list(masks))
        """Of the decoder's parameters, on the device."""
        self.looked_at = False
        """Whether the sites know which structures of the decision are live."""

    def _settle(self) -> Tensor:
        """Note the decision without noise; returns the share of structures that changed sides.

        A sampled decision changes by half at every step, which says nothing of what was learned.
        """
        before = torch.cat(self.settled)
        self.settled = self._without_noise() if self.config.decision.noise else self.masks
        return (torch.cat(self.settled) != before).float().mean()

    def step(self, index: int) -> Record:
        settings = self.config.decision
        record = Record(step=index, phase="control", loss=0.0, lr=0.0, tokens=0)
        if settings.learn and index % settings.interval == 0:
            record = self._generator_step(index, record)
        loss, lr = self._lora_step(index)
        came = grown(self.model)
        # All that the host reads of a step: the loss, and what goes beside it.
        seen = [loss, self.kept_share, *([] if came is None else [came])]
        plain, kept, *new = torch.stack([x.double() for x in seen]).tolist()
        self.looked_at = not any(new)
        tokens = self.stream.tokens_until(index + 1)
        return replace(record, loss=plain, lr=lr, tokens=tokens, kept_share=kept)

    def _generator_step(self, index: int, record: Record) -> Record:
        settings = self.config.decision
        before = index // settings.interval  # generator steps
        for group in self.generator_optimizer.param_groups:
            group["lr"] = self.rate * self._generator_rate(index)
        noise = torch.Generator().manual_seed((self.config.seed * 1_000_003 + index) % 2**63)
        decision = decide(
            self.generator(),
            self.feasible,
            temperature=settings.temperature,
            noise=noise if settings.noise else None,
            noise_scale=settings.noise,
            projected=settings.projection,
        )
        self.tuned.requires_grad_(False)
        set_decision(self.model, decision.masks, "whole")
        soft_share = self.feasible.kept_share(decision.unprojected)
        own = settings.protect_share if self.protected_stream else 0.0
        penalty = budget_penalty(soft_share, self.feasible.target_share, settings.penalty)
        told = None
        if self.protected_stream:
            told, _ = self._decision_gradients(self.protected_stream(before), own)
        now, plain = self._decision_gradients(self.decision_stream(before), 1 - own, penalty)
        parameters = list(self.generator.parameters())
        ranks.add_up(p.grad for p in parameters if p.grad is not None)
        self.accelerator.clip_grad_norm_(parameters, self.config.train.clip)
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad()
        self.tuned.requires_grad_(True)
        if now:
            self._follow(now if told is None else mean_importance(now, told, own), before)
        self._hold(_agreed(mask.detach() >= 0.5 for mask in decision.masks))
        seen = [plain, soft_share.detach(), self._settle()]
        loss, soft, churn = torch.stack([x.double() for x in seen]).tolist()
        return replace(record, decision_loss=loss, soft_share=soft, churn=churn)

    def _decision_gradients(
        self, parts: Iterable[Part], share: float, penalty: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        follows = self.config.decision.follow and self.importance is not None
        return add_decision_gradients(
            self.model, self.teacher, parts, self.config, self.accelerator,
            share=share, penalty=penalty, followed=self.feasible if follows else None,
        )  # fmt: skip

    def _generator_rate(self, index: int) -> float:
        """Warm-up, then linearly down to zero at the freeze.

        AdamW's first step moves every logit by the same amount, whatever its gradient. Near the
        freeze the decision must rest, so that the weights are tuned for it.
        """
        settings = self.config.decision
        risen = (index // settings.interval + 1) / GENERATOR_WARMUP
        return settings.lr * min(1.0, risen) * (1 - index / self.last_step)

    def _follow(self, now: list[Tensor], before: int) -> None:
        """Add this step's scores to the mean importance, and set the logits' base by it.

        before: generator steps that were added already.
        """
        assert self.importance is not None
        more = self.config.train.batch_blocks
        start = min(self.config.decision.importance_blocks, len(self.stream.blocks.input_ids))
        seen = start + before * more
        self.importance = mean_importance(self.importance, now, more / (seen + more))
        self.generator.set_base(starting_logits(self.importance, self.feasible))

    def _lora_step(self, index: int) -> tuple[Tensor, float]:
        settings = self.config.decision
        rate = self.rate * rate_of_step(
            index, steps=self.config.steps, warmup=self.config.train.warmup, decay=False
        )
        lr = rate * self.config.lora.lr
        if not self.looked_at:
            self.graphs.reset()
        set_decision(self.model, self.masks, settings.placement, held=self.looked_at)
        # The strength grows through the phase, so that groups reach zero at the freeze.
        strength = settings.strength * (index + 1) / self.last_step
        lasso = settings.regularizer == "lasso"
        plain = add_gradients(
            self.stream(index),
            lambda blocks: step_loss(self.model, self.teacher, blocks, self.config),
            self.accelerator,
            beside=strength * 1e-3 * group_lasso(self.model, self.masks) if lasso else None,
            graphs=self.graphs,
        )
        self.tuned.step(rate)
        if settings.regularizer == "proximal":
            proximal_step(self.model, self.masks, strength * lr)
        return plain, lr

    def validate(self) -> float | None:
        """None: the decision is still moving."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return self.tuned.state_dict() | {
            "generator": self.generator.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "masks": list(self.masks),
            "importance": self.importance,
            # What lies where follows from all decisions so far, and the order of sums from that.
            "slots": slots_of(self.model),
            "looked_at": self.looked_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Weights that are not tuned are in no checkpoint: the repair makes them as they were.
        self._hold(Masks(mask.to(self.accelerator.device) for mask in state["masks"]))
        self.tuned.load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.importance = state["importance"]
        self._settle()
        if slots := state.get("slots"):
            restore_slots(self.model, self.masks, self.config.decision.placement, slots)
            self.looked_at = state["looked_at"]


def _agreed(masks: Iterable[Tensor]) -> Masks:
    """Rank 0's decision: sums in another order may part two ranks where structures tie."""
    decision = Masks(masks)
    ranks.take_from_main(decision)
    return decision
