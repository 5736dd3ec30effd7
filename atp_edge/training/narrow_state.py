"""The narrow model with its LoRA as a file of the checkpoint: at the freeze, and at the end."""

from __future__ import annotations

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp_edge.config import Config
from atp_edge.model.narrow import build_model, narrow_config
from atp_edge.model.plan import read_plan
from atp_edge.run.files import file_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.training.adapters import add_recovery_adapter
from atp_edge.training.setup import source_config


def save_narrow_peft(model: PeftModel, run: RunFolder, name: str) -> None:
    with file_atomically(run.checkpoint / f"{name}.safetensors") as beside:
        save_file(_plain_state(model), beside)


def load_narrow_peft(config: Config, run: RunFolder, name: str) -> PeftModel:
    """The narrow model with its LoRA, at the freeze (`frozen`) or at the end (`tuned`)."""
    dense_config = source_config(config)
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


def _plain_state(model: PeftModel) -> dict[str, Tensor]:
    """The state without the second name of tied embeddings."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    if model.get_base_model().config.tie_word_embeddings:
        del state["base_model.model.lm_head.weight"]
    return state
