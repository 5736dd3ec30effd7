"""The three parts of training, as the algorithm has them: dense, joint with its freeze, recovery.

Every part leaves its result in the run's folder and is skipped when it is already there, so that a
killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks, drawn
from atp_edge.decision.baselines import BASELINES
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.decision.importance import starting_logits, taylor_importance
from atp_edge.decision.projection import project
from atp_edge.evaluation.text_loss import TextLoss, text_loss
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.model.plan import Plan, plan_of, shares, write_plan
from atp_edge.model.structures import Masks
from atp_edge.reconstruction.repair import Repair
from atp_edge.reconstruction.teacher_match import match_teacher
from atp_edge.reconstruction.value_rotation import rebase_values
from atp_edge.training.adapters import add_recovery_adapter, with_lora
from atp_edge.training.cpu import giving_back_freed_memory
from atp_edge.training.learners import JointLearner, Tuner
from atp_edge.training.loop import Learner, PhaseState, drop_damaged, phase_begun, run_phase
from atp_edge.training.narrow_state import load_narrow_peft, save_narrow_peft
from atp_edge.training.setup import (
    AUTOCAST,
    TrainContext,
    feasible_of,
    load_dense,
    placed,
    tokenizer_of,
)

Part = Callable[[TrainContext], dict[str, Any]]


def tune_dense(context: TrainContext) -> dict[str, Any]:
    """The baseline that recovery is measured against, and the teacher: dense with plain LoRA."""
    config, run, splits = context.config, context.run, context.splits
    context.progress.say("measuring the dense model as it came")
    model = placed(load_dense(config), context.accelerator)
    untuned = loss_of(model, splits.test, context.accelerator)
    tuned = with_lora(config, model)
    context.progress.phase("dense baseline", 0, config.steps, None)
    learner = Tuner(
        tuned,
        splits.train,
        config,
        context.accelerator,
        phase="dense",
        validation=splits.validation,
    )
    state = drive(learner, context)
    merged = merge(tuned)
    save_narrow(merged, tokenizer_of(config), run.dense)
    loss = loss_of(merged, splits.test, context.accelerator)
    return {"untuned_perplexity": untuned.perplexity} | figures_of(loss) | phase_summary(state)


def learn_decision(context: TrainContext) -> dict[str, Any]:
    """The joint loop, then the freeze: plan.json, and the narrow model to recover."""
    learner = _prepare_joint(context)
    progress, config = context.progress, context.config
    progress.phase("joint", 0, config.control_steps, learner.feasible.target_share)
    state = drive(learner, context)
    frozen = _narrowed(learner, context)
    # Neither the dense model nor the loop's moments stand beside what is held next.
    del learner
    context.accelerator.free_memory()
    return _freeze(frozen, context) | phase_summary(state)


def recover(context: TrainContext) -> dict[str, Any]:
    """The narrow model tuned for the rest of the steps, with the dense tuned one as its teacher."""
    config, splits = context.config, context.splits
    narrow = load_narrow_peft(config, context.run, "frozen")
    placed(narrow.get_base_model(), context.accelerator)
    learner = Tuner(
        narrow,
        splits.train,
        config,
        context.accelerator,
        phase="recovery",
        first_step=config.control_steps,
        teacher=_teacher(context),
        retrain=config.recovery.retrain,
        validation=splits.validation,
    )
    context.progress.phase("recovery", config.control_steps, config.steps, None)
    state = drive(learner, context)
    save_narrow_peft(narrow, context.run, "tuned")
    return figures_of(loss_of(narrow, splits.test, context.accelerator)) | phase_summary(state)


PARTS: dict[str, Part] = {
    "tune_dense": tune_dense,
    "learn_decision": learn_decision,
    "recover": recover,
}
"""In their order, by their keys in checkpoint/parts.json."""


def run_part(name: str, context: TrainContext) -> dict[str, Any]:
    """The figures of a part of training and the seconds it took; run unless the folder has what it
    made, as it made it."""
    run, say = context.run, context.progress.say
    if trouble := run.records.trouble(name):
        if name in run.parts():
            say(f"{name} again: {trouble}")
        drop_damaged(run.path, say)
        began, read = time.perf_counter(), run.records.reads(name)
        figures = PARTS[name](context)
        context.accelerator.free_memory()  # Else it holds the part's optimizers and their weights.
        run.add_part(name, figures | {"seconds": time.perf_counter() - began}, read)
    found: dict[str, Any] = run.parts()[name]
    return found


# The joint phase


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where the generator starts: logits [size] a site (None: all kept), and the importance that
    they come from, where it can be measured again along the way."""

    logits: list[Tensor] | None = None
    importance: list[Tensor] | None = None


def _prepare_joint(context: TrainContext) -> JointLearner:
    """The dense model with LoRA under its first decision, repaired and near the teacher."""
    config, splits, accelerator = context.config, context.splits, context.accelerator
    dense = placed(load_dense(config), accelerator).requires_grad_(False)
    feasible = feasible_of(config, dense.config)
    if config.decision.space == "head-dims":
        context.progress.say("turning the values so that few dimensions carry most")
        with accelerator.autocast():
            rebase_values(dense, splits.train.spread(config.decision.importance_blocks))
    start = _start(dense, feasible, context)
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
        teacher=_teacher(context),
        retrain=config.recovery.retrain,
        importance=start.importance,
    )
    if config.recovery.reconstruct_blocks:
        learner.repair = _repair(learner, context)
    # On resume with `retrain`, the checkpoint already contains the closed-form update.
    resumed = config.recovery.retrain and phase_begun(context.run.path) == learner.phase
    if config.control_steps and not resumed:
        set_decision(model, learner.masks, "whole", skip=False)
        _match_teacher(model, 0, context)
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
            return _Start(logits=starting_logits(scores, feasible), importance=scores)
        scores = BASELINES[settings.start](dense, sample, feasible)
    thresholds = project(scores, feasible).thresholds
    return _Start(logits=[x - t for x, t in zip(scores, thresholds, strict=True)])


def _repair(learner: JointLearner, context: TrainContext) -> Repair | None:
    """Repair what the first decision cuts; the repair itself, where it goes on to move."""
    accelerator, config = context.accelerator, context.config
    context.progress.say("repairing what the first decision cuts")
    sample = context.splits.train.spread(config.recovery.reconstruct_blocks)
    with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
        repair = Repair(learner.model, learner.masks, sample)
    return repair if config.repairs_along else None  # Done once, what it measured takes memory.


def _match_teacher(model: PeftModel, step: int, context: TrainContext) -> None:
    """Bring the layers near the dense tuned model's in closed form, on the blocks that the steps
    read from this one on: no text is read that they do not read."""
    config, train, accelerator = context.config, context.splits.train, context.accelerator
    first = step * config.train.batch_blocks
    left = min(config.train_blocks - first, len(train.input_ids))
    count = min(config.recovery.approach_blocks, left)
    if count:
        context.progress.say("bringing the layers near the dense tuned model's")
        dense = placed(load_narrow(context.run.dense), accelerator)
        with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
            match_teacher(model, dense, drawn(train, first, count, seed=config.seed))


# The freeze


@dataclass(frozen=True, kw_only=True)
class _Frozen:
    """The last decision, and the narrow model that it makes."""

    plan: Plan
    narrow: PeftModel
    decoder_share: float
    whole_share: float
    masked_narrow_max_error: float


def _narrowed(learner: JointLearner, context: TrainContext) -> _Frozen:
    """Take the decision without noise and cut the model by it."""
    context.progress.say("freezing the decision")
    model, masks = learner.model, learner.freeze()
    shape = model_shape(model.get_base_model().config)
    kept = [tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks]
    plan = plan_of(shape, kept, context.config.decision.space)
    narrow = narrow_peft(model, plan)
    share = shares(shape, model_shape(narrow.get_base_model().config))
    return _Frozen(
        plan=plan,
        narrow=narrow,
        decoder_share=share.decoder,
        whole_share=share.whole,
        masked_narrow_max_error=masked_narrow_error(model, narrow, masks, context.splits.decision),
    )


def _freeze(frozen: _Frozen, context: TrainContext) -> dict[str, Any]:
    """The narrow model near the teacher, its adapter begun anew if asked, and both on disk."""
    config, narrow = context.config, frozen.narrow
    _match_teacher(narrow, config.control_steps, context)
    if config.recovery.adapter != "lora":
        narrow = add_recovery_adapter(merge(narrow), config, frozen.plan)
    save_narrow_peft(narrow, context.run, "frozen")
    write_plan(frozen.plan, context.run.plan)
    loss = loss_of(narrow, context.splits.test, context.accelerator)
    return {
        "perplexity": loss.perplexity,
        "masked_narrow_max_error": frozen.masked_narrow_max_error,
        "decoder_share": frozen.decoder_share,
        "whole_share": frozen.whole_share,
    }


@torch.no_grad()
def masked_narrow_error(model: PeftModel, narrow: PeftModel, masks: Masks, blocks: Blocks) -> float:
    """Largest difference of logits between the masked and the narrow model, fp32, one block.

    Masks of numbers really mask; a bool one would be computed as narrow as the narrow model.
    """
    batch = blocks.first(1).to(model.device)
    set_decision(model, Masks(mask.float() for mask in masks), "whole")
    difference = model(input_ids=batch.input_ids).logits - narrow(input_ids=batch.input_ids).logits
    return float(difference.abs().max())


# What all parts share


def _teacher(context: TrainContext) -> PreTrainedModel | None:
    """The dense tuned model, if the run distils from it."""
    if not context.config.recovery.distill:
        return None
    dense = placed(load_narrow(context.run.dense), context.accelerator)
    return frozen_for(context.config.train.precision, dense)


def frozen_for(precision: str, model: PreTrainedModel) -> PreTrainedModel:
    """A model that no step changes, its projections kept in the type that autocast gives them:
    half the memory, the same outputs, and nothing cast at every step."""
    head = model.get_output_embeddings()  # may be the embeddings, whose outputs are fp32
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and precision in AUTOCAST:
            module.to(AUTOCAST[precision])
    return model.requires_grad_(False)


def drive(learner: Learner, context: TrainContext) -> PhaseState:
    """A learner through its phase, with the run's checkpoints and patience."""
    return run_phase(
        learner,
        folder=context.run.path,
        save_every=context.config.save_every,
        on_record=context.progress.record,
        say=context.progress.say,
        patience=context.config.train.patience,
    )


def phase_summary(state: PhaseState) -> dict[str, Any]:
    """What a phase's figures say of its course: the step it kept, and why it ever went back."""
    kept = state.best_step if state.worse else state.step
    return {"kept_step": kept, "returns": list(state.returns)}


def loss_of(model: nn.Module, blocks: Blocks, accelerator: Accelerator) -> TextLoss:
    """What a model loses on blocks, in the precision it trains in."""
    with accelerator.autocast():
        return text_loss(model, blocks)


def figures_of(loss: TextLoss) -> dict[str, Any]:
    """Perplexity, and nats a token of every block: what two models differ by is paired there."""
    return {"perplexity": loss.perplexity, "block_losses": loss.by_block}
