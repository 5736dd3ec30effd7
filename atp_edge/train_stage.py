"""The first stage: dense baseline, decision and LoRA together, freeze, recovery.

Every part leaves its result in the run's folder and is skipped when it is already there, so that a
killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from atp_export.checkpoint import load_narrow, save_narrow
from atp_export.narrow import build_model, merge, narrow_config, narrow_peft, widen_lora
from atp_kernels import backend_name
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from atp_edge.approach import approach
from atp_edge.baselines import BASELINES
from atp_edge.budget import Space, project
from atp_edge.config import Config
from atp_edge.cpu import giving_back_freed_memory
from atp_edge.data import Blocks, Splits, drawn
from atp_edge.evaluate import TextLoss, text_loss
from atp_edge.families import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    model_shape,
    module_path,
)
from atp_edge.files import file_atomically, folder_atomically
from atp_edge.generator import DecisionGenerator
from atp_edge.importance import starting_logits, taylor_importance
from atp_edge.inputs import (
    accelerate,
    load_dense,
    model_source,
    placed,
    space_of,
    splits_of,
    tokenizer_of,
)
from atp_edge.lora import add_lora
from atp_edge.losses import language_loss
from atp_edge.masked import set_decision
from atp_edge.phase import Learner, PhaseState, phase_begun, run_phase
from atp_edge.plan import Plan, plan_of, read_plan, shares, write_plan
from atp_edge.progress import Progress
from atp_edge.reconstruct import Repair
from atp_edge.run_folder import RunFolder
from atp_edge.trainer import JointLearner, Tuner
from atp_edge.value_basis import rebase_values

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, run: RunFolder, progress: Progress) -> None:
    """Learn the plan and the slim model's weights; writes dense/, plan.json and adapter/."""
    began = time.perf_counter()
    accelerator = accelerate(config)
    progress.say("reading the domain text")
    splits = splits_of(config)
    epochs = config.train_blocks / len(splits.train.input_ids)
    if epochs > 1:
        progress.say(f"the train split is read {epochs:.1f} times")
    for part in (tune_dense, learn_decision, recover):
        run_part(part, config, run, splits, accelerator, progress)
    plan = read_plan(run.plan)
    if config.recovery.adapter == "lora" and config.decision.space == "groups":
        _save_adapter(config, run, plan)
    parts = run.parts()
    dense_perplexity = parts["tune_dense"]["perplexity"]
    run.add_metrics(
        "train",
        {
            "untuned_perplexity": parts["tune_dense"]["untuned_perplexity"],
            "dense_tuned_perplexity": dense_perplexity,
            "perplexity_at_freeze": parts["learn_decision"]["perplexity"],
            "perplexity": parts["recover"]["perplexity"],
            "recovery": dense_perplexity / parts["recover"]["perplexity"],
            "masked_narrow_max_error": parts["learn_decision"]["masked_narrow_max_error"],
            "steps": config.steps,
            "tokens": config.train_tokens,
            "seconds": time.perf_counter() - began,
            "kernels": backend_name(),
            "budget": config.budget,
            "decoder_share": parts["learn_decision"]["decoder_share"],
            "whole_share": parts["learn_decision"]["whole_share"],
            "plan_sha256": plan.sha256,
            "data": asdict(splits.report),
            "kept_step": parts["recover"]["kept_step"],
            "returns": [text for name in parts for text in parts[name]["returns"]],
        },
    )


Part = Callable[[Config, RunFolder, Splits, Accelerator, Progress], dict[str, Any]]


def run_part(
    part: Part,
    config: Config,
    run: RunFolder,
    splits: Splits,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Any]:
    """The figures of a part of training and the seconds it took; run unless the folder has them."""
    if part.__name__ not in run.parts():
        began = time.perf_counter()
        figures = part(config, run, splits, accelerator, progress)
        accelerator.free_memory()  # Else it holds the part's optimizers: moments and weights.
        run.add_part(part.__name__, figures | {"seconds": time.perf_counter() - began})
    found: dict[str, Any] = run.parts()[part.__name__]
    return found


def with_lora(config: Config, model: PreTrainedModel) -> PeftModel:
    """The run's plain LoRA on every projection."""
    return add_lora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        seed=config.seed,
        space=config.decision.space,
    )


def add_recovery_adapter(model: PreTrainedModel, config: Config, plan: Plan) -> PeftModel:
    """The LoRA that recovery tunes on a narrow model, as `recovery.adapter` says."""
    lora, ranks = config.lora, None
    if config.recovery.adapter == "ranks":
        ranks = redistributed_ranks(plan, lora.rank)
    return add_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        seed=config.seed,
        ranks=ranks,
        dora=config.recovery.adapter == "dora",
    )


def redistributed_ranks(plan: Plan, rank: int) -> dict[str, int]:
    """A rank for every projection by its path: in proportion to what its site lost, in the mean
    `rank`, at least a quarter of it."""
    lost = {(s.layer, s.kind): 1 - s.width / s.size for s in plan.sites}
    mean = sum(lost.values()) / len(lost)
    ranks = {}
    for (layer, kind), share in lost.items():
        wanted = rank if mean == 0 else round(rank * (0.25 + 0.75 * share / mean))
        for projection in ATTENTION_PROJECTIONS if kind == "attention" else MLP_PROJECTIONS:
            ranks[module_path(layer, projection)] = max(1, wanted)
    return ranks


def loss_of(model: nn.Module, blocks: Blocks, accelerator: Accelerator) -> TextLoss:
    """What a model loses on blocks, in the precision it trains in."""
    with accelerator.autocast():
        return text_loss(model, blocks)


def figures_of(loss: TextLoss) -> dict[str, Any]:
    """Perplexity, and nats a token of every block: what two models differ by is paired there."""
    return {"perplexity": loss.perplexity, "block_losses": loss.by_block}


def tune_dense(
    config: Config, run: RunFolder, splits: Splits, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """The baseline that recovery is measured against, and the teacher: dense with plain LoRA."""
    progress.say("measuring the dense model as it came")
    model = placed(load_dense(config), accelerator)
    untuned = loss_of(model, splits.test, accelerator)
    tuned = with_lora(config, model)
    progress.phase("dense baseline", 0, config.steps, None)
    learner = Tuner(
        tuned, splits.train, config, accelerator, phase="dense", validation=splits.validation
    )
    state = drive(learner, config, run, progress)
    merged = merge(tuned)
    save_narrow(merged, tokenizer_of(config), run.dense)
    loss = loss_of(merged, splits.test, accelerator)
    return {"untuned_perplexity": untuned.perplexity} | figures_of(loss) | _story(state)


def learn_decision(
    config: Config, run: RunFolder, splits: Splits, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """The joint loop, then the freeze: plan.json, the repair, and the narrow model to recover."""
    dense = placed(load_dense(config), accelerator).requires_grad_(False)
    space = space_of(config, dense.config)
    if config.decision.space == "head-dims":
        progress.say("turning the values so that few dimensions carry most")
        with accelerator.autocast():
            rebase_values(dense, splits.train.spread(config.decision.importance_blocks))
    start = _start(config, dense, space, splits.train, accelerator, progress)
    model = with_lora(config, dense)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = DecisionGenerator(space.sites, start.logits)
    learner = JointLearner(
        model,
        generator,
        space,
        splits.train,
        splits.decision,
        config,
        accelerator,
        teacher=_teacher(config, run, accelerator),
        retrain=config.recovery.retrain,
        importance=start.importance,
    )
    if config.recovery.reconstruct_blocks:
        progress.say("repairing what the first decision cuts")
        sample = splits.train.spread(config.recovery.reconstruct_blocks)
        with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
            learner.repair = Repair(model, learner.masks, sample)
        if not config.repairs_along:
            learner.repair = None  # It is done; what it measured takes memory.
    # A checkpoint of kept weights that are tuned holds them as they were moved.
    moved = config.recovery.retrain and phase_begun(run.path) == learner.phase
    if config.control_steps and not moved:
        set_decision(model, learner.masks, "whole", skip=False)
        _approach(model, 0, config, run, splits.train, accelerator, progress)
    progress.phase("joint", 0, config.control_steps, space.target_share)
    state = drive(learner, config, run, progress)

    progress.say("freezing the decision")
    masks, shape = learner.freeze(), model_shape(dense.config)
    plan = plan_of(
        shape,
        [tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks],
        config.decision.space,
    )
    narrow = narrow_peft(model, plan)
    error = masked_narrow_error(model, narrow, masks, splits.decision)
    # Neither the dense model nor the loop's moments stand beside what is held next.
    del learner, model, dense
    accelerator.free_memory()
    _approach(narrow, config.control_steps, config, run, splits.train, accelerator, progress)
    if config.recovery.adapter != "lora":
        narrow = add_recovery_adapter(merge(narrow), config, plan)
    _save_narrow_peft(narrow, run, "frozen")
    write_plan(plan, run.plan)
    loss = loss_of(narrow, splits.test, accelerator)
    kept = shares(shape, model_shape(narrow.get_base_model().config))
    return {
        "perplexity": loss.perplexity,
        "masked_narrow_max_error": error,
        "decoder_share": kept.decoder,
        "whole_share": kept.whole,
    } | _story(state)


def _approach(
    model: PeftModel,
    step: int,
    config: Config,
    run: RunFolder,
    train: Blocks,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Bring the layers near the dense tuned model's in closed form, on the blocks that the steps
    read from this one on: no text is read that they do not read."""
    first = step * config.train.batch_blocks
    left = min(config.train_blocks - first, len(train.input_ids))
    count = min(config.recovery.approach_blocks, left)
    if count:
        progress.say("bringing the layers near the dense tuned model's")
        dense = placed(load_narrow(run.dense), accelerator)
        with accelerator.autocast(), giving_back_freed_memory(accelerator.device.type):
            approach(model, dense, drawn(train, first, count, seed=config.seed))


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where the generator starts: logits [size] a site (None: all kept), and the importance that
    they come from, where it can be measured again along the way."""

    logits: list[Tensor] | None = None
    importance: list[Tensor] | None = None


def _start(
    config: Config,
    dense: PreTrainedModel,
    space: Space,
    blocks: Blocks,
    accelerator: Accelerator,
    progress: Progress,
) -> _Start:
    kind = config.decision.start
    if kind == "all-kept":
        return _Start()
    progress.say(f"scoring the structures ({kind})")
    sample = blocks.spread(config.decision.importance_blocks)
    with accelerator.autocast():
        if kind == "importance":
            scores = taylor_importance(dense, sample, space, lambda b: language_loss(dense, b))
            return _Start(logits=starting_logits(scores, space), importance=scores)
        scores = BASELINES[kind](dense, sample, space)
    thresholds = project(scores, space).thresholds
    return _Start(logits=[x - t for x, t in zip(scores, thresholds, strict=True)])


def recover(
    config: Config, run: RunFolder, splits: Splits, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """The narrow model tuned for the rest of the steps, with the dense tuned one as its teacher."""
    narrow = _load_narrow_peft(config, run, "frozen")
    placed(narrow.get_base_model(), accelerator)
    learner = Tuner(
        narrow,
        splits.train,
        config,
        accelerator,
        phase="recovery",
        first_step=config.control_steps,
        teacher=_teacher(config, run, accelerator),
        retrain=config.recovery.retrain,
        validation=splits.validation,
    )
    progress.phase("recovery", config.control_steps, config.steps, None)
    state = drive(learner, config, run, progress)
    _save_narrow_peft(narrow, run, "tuned")
    return figures_of(loss_of(narrow, splits.test, accelerator)) | _story(state)


def _teacher(config: Config, run: RunFolder, accelerator: Accelerator) -> PreTrainedModel | None:
    """The dense tuned model, if the run distils from it."""
    if not config.recovery.distill:
        return None
    return frozen_for(config.train.precision, placed(load_narrow(run.dense), accelerator))


def frozen_for(precision: str, model: PreTrainedModel) -> PreTrainedModel:
    """A model that no step changes, its projections kept in the type that autocast gives them:
    half the memory, the same outputs, and nothing cast at every step."""
    head = model.get_output_embeddings()  # may be the embeddings, whose outputs are fp32
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head and precision in AUTOCAST:
            module.to(AUTOCAST[precision])
    return model.requires_grad_(False)


def drive(learner: Learner, config: Config, run: RunFolder, progress: Progress) -> PhaseState:
    """A learner through its phase, with the run's checkpoints and patience."""
    return run_phase(
        learner,
        folder=run.path,
        save_every=config.save_every,
        on_record=progress.record,
        say=progress.say,
        patience=config.train.patience,
    )


def _story(state: PhaseState) -> dict[str, Any]:
    """What a phase's figures say of its course: the step it kept, and why it ever went back."""
    kept = state.best_step if state.worse else state.step
    return {"kept_step": kept, "returns": list(state.returns)}


@torch.no_grad()
def masked_narrow_error(
    model: PeftModel, narrow: PeftModel, masks: list[Tensor], blocks: Blocks
) -> float:
    """Largest difference of logits between the masked and the narrow model, fp32, one block.

    Masks of numbers really mask; a bool one would be computed as narrow as the narrow model.
    """
    batch = blocks.first(1).to(model.device)
    set_decision(model, [mask.float() for mask in masks], "whole")
    difference = model(input_ids=batch.input_ids).logits - narrow(input_ids=batch.input_ids).logits
    return float(difference.abs().max())


def _plain_state(model: PeftModel) -> dict[str, Tensor]:
    """The state without the second name of tied embeddings."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    if model.get_base_model().config.tie_word_embeddings:
        del state["base_model.model.lm_head.weight"]
    return state


def _save_narrow_peft(model: PeftModel, run: RunFolder, name: str) -> None:
    with file_atomically(run.checkpoint / f"{name}.safetensors") as beside:
        save_file(_plain_state(model), beside)


def _load_narrow_peft(config: Config, run: RunFolder, name: str) -> PeftModel:
    """The narrow model with its LoRA, at the freeze (`frozen`) or at the end (`tuned`)."""
    dense_config = AutoConfig.from_pretrained(model_source(config.model))
    base = build_model(narrow_config(dense_config, read_plan(run.plan)), torch.float32)
    model = add_recovery_adapter(base, config, read_plan(run.plan))
    state = load_file(run.checkpoint / f"{name}.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [m for m in missing if "lm_head" not in m]:
        raise ValueError(
            f"{run.checkpoint / name}.safetensors does not fit {run.plan}: "
            "run `atp-edge train` again"
        )
    return model.eval()


def load_tuned(config: Config, run: RunFolder) -> PeftModel:
    """The narrow model with its LoRA as training left it."""
    if not (run.checkpoint / "tuned.safetensors").exists():
        raise ValueError(f"{run.path} is not trained yet: run {run.command('train')}")
    return _load_narrow_peft(config, run, "tuned")


def _save_adapter(config: Config, run: RunFolder, plan: Plan) -> None:
    """adapter/: the LoRA at the dense model's sizes, which plain peft loads on the dense model.

    Not written for an adapter begun anew at the freeze: it belongs to weights already merged. Nor
    in `head-dims`: its values are in another basis than the dense model's (`rebase_values`).
    """
    dense = load_dense(config)
    shape = model_shape(dense.config)
    wide = with_lora(config, dense)
    state = get_peft_model_state_dict(load_tuned(config, run))
    set_peft_model_state_dict(wide, widen_lora(state, shape, plan))
    with folder_atomically(run.adapter) as beside:
        wide.save_pretrained(beside)
