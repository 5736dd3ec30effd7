"""What stands before the joint phase: the dense model with LoRA under its first decision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atp_edge.decision.baselines import BASELINES
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.decision.importance import mean_importance, starting_logits, taylor_importance
from atp_edge.decision.projection import project
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.reconstruction.repair import Repair
from atp_edge.reconstruction.value_rotation import rebase_values
from atp_edge.run.freed_memory import giving_back_freed_memory
from atp_edge.training.adapters import with_lora
from atp_edge.training.frozen import load_base, pruned_kind, source_type
from atp_edge.training.learners import JointLearner
from atp_edge.training.loop import phase_begun
from atp_edge.training.setup import TrainContext, feasible_of, model_source
from atp_edge.training.teacher import match_layers, teacher_beside


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where the generator starts.

    logits: [size] a site; None: all kept. importance: what they come from, if the joint phase can
    go on measuring it.
    """

    logits: list[Tensor] | None = None
    importance: list[Tensor] | None = None


def prepare_joint(context: TrainContext) -> JointLearner:
    """The dense model with LoRA under its first decision, repaired and near the teacher."""
    config, splits, accelerator = context.config, context.splits, context.accelerator
    dense = load_base(
        config, pruned_kind(config, source_type(model_source(config.model))), accelerator
    )
    feasible = feasible_of(config, dense.config)
    if config.decision.space == "head-dims":
        context.progress.say("rotating the values: few dimensions then carry most")
        with accelerator.autocast():
            rebase_values(dense, splits.train.spread(config.decision.importance_blocks))
    start = _start(dense, feasible, context)
    teacher = teacher_beside(dense, context)
    model = with_lora(config, dense)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = DecisionGenerator(feasible.sites, start.logits)
    learner = JointLearner(
        model,
        generator,
        feasible,
        splits.train,
        splits.decision,
        config,
        accelerator,
        teacher=teacher,
        retrain=config.recovery.retrain,
        importance=start.importance,
        protected=splits.protected,
    )
    if config.recovery.reconstruct_blocks:
        learner.repair = _repair(learner, context)
    # On resume with `retrain`, the checkpoint already contains the closed-form update.
    resumed = config.recovery.retrain and phase_begun(context.run.path) == learner.phase
    if config.control_steps and not resumed:
        set_decision(model, learner.masks, "whole", skip=False)
        match_layers(model, 0, context, teacher)
    return learner


def _start(dense: PreTrainedModel, feasible: FeasibleDecisions, context: TrainContext) -> _Start:
    settings = context.config.decision
    if settings.start == "all-kept":
        return _Start()
    context.progress.say(f"scoring the structures ({settings.start})")
    sample = context.splits.train.spread(settings.importance_blocks)
    with context.accelerator.autocast():
        if settings.start == "importance":
            scores = taylor_importance(dense, sample, feasible, lambda b: language_loss(dense, b))
            if protected := context.splits.protected:
                told = protected.spread(settings.importance_blocks)
                own = taylor_importance(dense, told, feasible, lambda b: language_loss(dense, b))
                scores = mean_importance(scores, own, settings.protect_share)
            return _Start(logits=starting_logits(scores, feasible), importance=scores)
        scores = BASELINES[settings.start](dense, sample, feasible)
    thresholds = project(scores, feasible).thresholds
    return _Start(logits=[x - t for x, t in zip(scores, thresholds, strict=True)])


def _repair(learner: JointLearner, context: TrainContext) -> Repair | None:
    """Repair what the first decision cuts; returns the repair if it is to follow the decision."""
    accelerator, config = context.accelerator, context.config
    context.progress.say("repairing what the first decision cuts")
    sample = context.splits.train.spread(config.recovery.reconstruct_blocks)
    with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
        repair = Repair(learner.model, learner.masks, sample, follows=config.repairs_along)
    return repair if config.repairs_along else None
