"""The narrow model with its LoRA as a file of the checkpoint: at the freeze, and at the end."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from atp_edge.config import Config
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import build_model, narrow_config, widen_lora
from atp_edge.model.plan import Plan, read_plan
from atp_edge.run.files import file_atomically, folder_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.training.adapters import add_recovery_adapter, with_lora
from atp_edge.training.setup import load_dense, model_source


def save_narrow_peft(model: PeftModel, run: RunFolder, name: str) -> None:
    with file_atomically(run.checkpoint / f"{name}.safetensors") as beside:
        save_file(_plain_state(model), beside)


def load_narrow_peft(config: Config, run: RunFolder, name: str) -> PeftModel:
    """The narrow model with its LoRA, at the freeze (`frozen`) or at the end (`tuned`)."""
    dense_config = AutoConfig.from_pretrained(model_source(config.model))
    base = build_model(narrow_config(dense_config, read_plan(run.plan)), torch.float32)
    model = add_recovery_adapter(base, config, read_plan(run.plan))
    path = run.checkpoint / f"{name}.safetensors"
    try:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except (SafetensorError, RuntimeError) as error:  # cut, or of other sizes
        raise ValueError(f"{path} is damaged ({error}); run {run.command('train')}") from error
    if unexpected or [m for m in missing if "lm_head" not in m]:
        raise ValueError(f"{path} does not fit {run.plan}: run `atp-edge train` again")
    return model.eval()


def load_tuned(config: Config, run: RunFolder) -> PeftModel:
    """The narrow model with its LoRA as training left it."""
    if not (run.checkpoint / "tuned.safetensors").exists():
        raise ValueError(f"{run.path} is not trained yet: run {run.command('train')}")
    return load_narrow_peft(config, run, "tuned")


def save_adapter(config: Config, run: RunFolder, plan: Plan) -> None:
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


def _plain_state(model: PeftModel) -> dict[str, Tensor]:
    """The state without the second name of tied embeddings."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    if model.get_base_model().config.tie_word_embeddings:
        del state["base_model.model.lm_head.weight"]
    return state
