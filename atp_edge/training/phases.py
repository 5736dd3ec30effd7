"""The three parts of training, as the algorithm has them: dense, joint with its freeze, recovery.

Every part leaves its result in the run's folder and is skipped when it is already there, so that a
killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from atp_edge.model.checkpoint import build_on_meta, write_checkpoint
from atp_edge.model.loading import stored_type, tensor_files
from atp_edge.model.merged import MergedWeights, base_and_adapter
from atp_edge.model.stream import reader_of
from atp_edge.run import ranks
from atp_edge.run.files import file_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.run.freed_memory import give_back_freed_memory, giving_back_freed_memory
from atp_edge.run.history import PHASE_NAMES
from atp_edge.run.peak_memory import peak_noted
from atp_edge.training.adapters import with_lora
from atp_edge.training.freeze import cut_by_decision, freeze
from atp_edge.training.frozen import frozen_kind, load_base
from atp_edge.training.joint import prepare_joint
from atp_edge.training.learners import Tuner
from atp_edge.training.loop import Learner, PhaseState, drop_damaged, run_phase
from atp_edge.training.measure import figures_of, loss_of
from atp_edge.training.narrow_state import load_narrow_peft, save_narrow_peft
from atp_edge.training.optimizer import lora_parameters
from atp_edge.training.setup import (
    TrainContext,
    model_source,
    placed,
    source_config,
    tokenizer_of,
)
from atp_edge.training.teacher import dense_adapter_file, dense_tuned, teacher_of

Part = Callable[[TrainContext], dict[str, Any]]


def tune_dense(context: TrainContext) -> dict[str, Any]:
    """The baseline that recovery is measured against, and the teacher: dense with plain LoRA."""
    config, run, splits = context.config, context.run, context.splits
    context.progress.say("measuring the dense model as it came")
    model = load_base(config, frozen_kind(config), context.accelerator)
    untuned = loss_of(model, splits.test, context.accelerator)
    tuned = with_lora(config, model)
    context.progress.phase(PHASE_NAMES["dense"], 0, config.steps, None)
    learner = Tuner(
        tuned,
        splits.train,
        config,
        context.accelerator,
        phase="dense",
        validation=splits.validation,
    )
    state = drive(learner, context)
    adapter = {name: x.detach().cpu() for name, x in lora_parameters(tuned).items()}
    del model, tuned, learner  # Its file is read again, a tensor at a time, and it whole after it.
    context.accelerator.free_memory()
    give_back_freed_memory()
    if ranks.is_main():
        with file_atomically(dense_adapter_file(run)) as beside:
            save_file(adapter, beside)
        _write_dense(adapter, context)
    ranks.wait()
    loss = loss_of(dense_tuned(context), splits.test, context.accelerator)
    return {
        "untuned_perplexity": untuned.perplexity,
        "untuned_block_losses": untuned.by_block,
        **figures_of(loss),
        **phase_summary(state),
    }


def _write_dense(adapter: Mapping[str, Tensor], context: TrainContext) -> None:
    """The tuned dense model in the type of its source, LoRA merged one tensor at a time."""
    config, source = context.config, model_source(context.config.model)
    dense = build_on_meta(source_config(config))
    read = base_and_adapter(reader_of(tensor_files(source)), adapter)
    with torch.device("meta"):
        tuned = with_lora(config, build_on_meta(dense.config))
    write_checkpoint(
        dense,
        MergedWeights(tuned, read),
        tokenizer_of(config),
        context.run.dense,
        like=source,
        dtype=stored_type(source),
    )


def learn_decision(context: TrainContext) -> dict[str, Any]:
    """The joint loop, then the freeze: plan.json, and the narrow model to recover."""
    progress, config, noted = context.progress, context.config, context.run.memory_json
    with peak_noted("before the joint steps", noted):
        learner = prepare_joint(context)
    progress.phase(PHASE_NAMES["control"], 0, config.control_steps, learner.feasible.target_share)
    with peak_noted("joint steps", noted):
        state = drive(learner, context)
    progress.say("freezing the decision")
    model, masks = learner.model, learner.freeze()
    # Neither the loop's moments nor the teacher stand beside what is held next.
    del learner
    context.accelerator.free_memory()
    with peak_noted("freeze", noted):
        with giving_back_freed_memory(context.accelerator.device.type):
            frozen = cut_by_decision(model, masks, context)
        del model
        return freeze(frozen, context) | phase_summary(state)


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
        teacher=teacher_of(context),
        retrain=config.recovery.retrain,
        validation=splits.validation,
    )
    context.progress.phase(PHASE_NAMES["recovery"], config.control_steps, config.steps, None)
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
    trouble = ranks.from_main(run.records.trouble(name) if ranks.is_main() else None)
    if trouble:
        if name in run.parts():
            say(f"{name} again: {trouble}")
        if ranks.is_main():
            drop_damaged(run.path, say)
        ranks.wait()
        began, read = time.perf_counter(), run.records.reads(name)
        with noting_its_peak(name, run):
            figures = PARTS[name](context)
        context.accelerator.free_memory()  # Else it holds the part's optimizers and their weights.
        if ranks.is_main():
            run.add_part(name, figures | {"seconds": time.perf_counter() - began}, read)
        ranks.wait()
    found: dict[str, Any] = run.parts()[name]
    return found


def noting_its_peak(name: str, run: RunFolder) -> AbstractContextManager[None]:
    """Of a part as a whole; `learn_decision` notes its own, step by step."""
    said = {"tune_dense": "dense baseline", "recover": "recovery"}.get(name)
    return peak_noted(said, run.memory_json) if said else nullcontext()


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
