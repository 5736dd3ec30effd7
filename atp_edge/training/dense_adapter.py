"""adapter/: the run's LoRA at the dense model's sizes, where it is worth something there.

It was tuned for a model whose kept weights moved with it, so that on the dense model it may do next
to nothing: what it buys is measured first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import TextLoss
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import widen_lora
from atp_edge.model.plan import Plan
from atp_edge.run import ranks
from atp_edge.run.files import folder_atomically, read_json, write_json
from atp_edge.training.adapters import with_lora
from atp_edge.training.frozen import frozen_kind, load_base
from atp_edge.training.measure import loss_of
from atp_edge.training.narrow_state import tuned_lora
from atp_edge.training.setup import TrainContext, hub_id_of
from atp_edge.training.teacher import dense_tuned

MEASURED_BLOCKS = 8
LEAST_SHARE = 0.5
"""Of what tuning the dense model buys, in nats: an adapter that buys less is not written."""


def save_adapter(context: TrainContext, plan: Plan) -> dict[str, Any]:
    """Write adapter/, or remove it where it is worth nothing; returns what it was judged by."""
    config, run = context.config, context.run
    judged: dict[str, Any] = {}
    why = _unfit(config)
    if not why:
        # One model at a time: this one is let go before the other is read.
        tuned = loss_of(dense_tuned(context), _measured(context), context.accelerator)
        wide = _widened(context, plan)
        judged = _worth(wide, tuned, context)
        if judged["share"] >= LEAST_SHARE:
            if ranks.is_main():
                with folder_atomically(run.adapter) as beside:
                    write_peft(wide, beside, config)
            return judged | {"written": True}
        why = (
            f"on the dense model it buys {judged['share']:.0%} of what tuning that model buys, "
            f"less than {LEAST_SHARE:.0%}: the kept weights were tuned beside it"
        )
    context.progress.say(f"no adapter/: {why}")
    if ranks.is_main():
        shutil.rmtree(run.adapter, ignore_errors=True)
    return judged | {"written": False, "why": why}


def write_peft(model: PeftModel, folder: Path, config: Config) -> None:
    """A peft folder that is the same on every machine: no path of this one, sorted names."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's stub, with the base model's path
    path = folder / "adapter_config.json"
    written = read_json(path)
    named = {"base_model_name_or_path": hub_id_of(config.model)}
    write_json(path, written | named | {"target_modules": sorted(written["target_modules"])})


def _unfit(config: Config) -> str:
    """Why a run's LoRA cannot fit the dense model, if it cannot."""
    if config.recovery.adapter != "lora":
        return "it was begun anew at the freeze, on weights already merged"
    if config.decision.space == "head-dims":
        return "decision.space = 'head-dims' turns the values into another basis than the model's"
    return ""


def _widened(context: TrainContext, plan: Plan) -> PeftModel:
    """The dense model with the tuned LoRA, zero where the plan cut."""
    config = context.config
    dense = load_base(config, frozen_kind(config), context.accelerator)
    shape = model_shape(dense.config)
    wide = with_lora(config, dense)
    set_peft_model_state_dict(wide, widen_lora(tuned_lora(config, context.run), shape, plan))
    return wide


def _measured(context: TrainContext) -> Blocks:
    return context.splits.decision.first(MEASURED_BLOCKS)


def _worth(wide: PeftModel, tuned: TextLoss, context: TrainContext) -> dict[str, Any]:
    """Perplexities on blocks of the decision split: untuned, with the adapter, dense tuned; and the
    share of the gain in nats that the adapter has."""
    blocks, accelerator = _measured(context), context.accelerator
    with wide.disable_adapter():
        untuned = loss_of(wide, blocks, accelerator)
    adapted = loss_of(wide, blocks, accelerator)
    gain = untuned.mean - tuned.mean
    return {
        "blocks": len(blocks.input_ids),
        "untuned_perplexity": untuned.perplexity,
        "perplexity": adapted.perplexity,
        "dense_tuned_perplexity": tuned.perplexity,
        "share": (untuned.mean - adapted.mean) / gain if gain > 0 else 0.0,
    }
