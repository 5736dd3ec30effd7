"""The narrow model with its LoRA as a file of the checkpoint: at the freeze, and at the end."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.config import Config
from atp_edge.model.checkpoint import build_on_meta
from atp_edge.model.loading import read_tensor, tensors_of
from atp_edge.model.narrow import build_model, narrow_config
from atp_edge.model.plan import read_plan
from atp_edge.model.sharded import fill_sharded, whole
from atp_edge.model.stream import fill, without_weights, write_tensors
from atp_edge.run import ranks
from atp_edge.run.files import file_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.training.adapters import add_recovery_adapter
from atp_edge.training.frozen import shards
from atp_edge.training.setup import source_config


def save_narrow_peft(model: PeftModel, run: RunFolder, name: str) -> None:
    """Write the parameters as they are, tied ones once, one at a time.

    Called on every rank, for each may hold a share; rank 0 writes.
    """
    state = dict(model.named_parameters())
    if ranks.is_main():
        with file_atomically(run.checkpoint / f"{name}.safetensors") as beside:
            write_tensors(beside, state, lambda key: whole(state[key].detach()))
    else:
        for tensor in state.values():
            whole(tensor.detach())


def load_narrow_peft(config: Config, run: RunFolder, name: str) -> PeftModel:
    """The narrow model with its LoRA, at the freeze (`frozen`) or at the end (`tuned`)."""
    dense_config, plan = source_config(config), read_plan(run.plan)
    with without_weights():
        base = build_model(narrow_config(dense_config, plan), torch.float32)
        model = add_recovery_adapter(base, config, plan)
    model.get_base_model().tie_weights()
    path = narrow_file(run, name)
    wanted = {key: x.shape for key, x in model.named_parameters()}
    _check(path, run, wanted)
    filled = fill_sharded if shards(config) else fill
    filled(model, wanted, lambda key: read_tensor(key, path).clone())  # Not the file's memory.
    model.get_base_model().tie_weights()
    return model.eval()


def load_tuned(config: Config, run: RunFolder) -> PeftModel:
    """The narrow model with its LoRA as training left it."""
    _check_trained(run)
    return load_narrow_peft(config, run, "tuned")


def tuned_lora(config: Config, run: RunFolder) -> dict[str, Tensor]:
    """The factors of its LoRA alone, by peft's names in a saved adapter."""
    path = narrow_file(run, "tuned")
    names = [name for name, _ in tuned_on_meta(config, run).named_parameters() if "lora_" in name]
    return {name.replace(".default.", "."): read_tensor(name, path).clone() for name in names}


def tuned_on_meta(config: Config, run: RunFolder) -> PeftModel:
    """The same without memory for its weights, which lie in `narrow_file(run, "tuned")`."""
    _check_trained(run)
    plan = read_plan(run.plan)
    base = build_on_meta(narrow_config(source_config(config), plan))
    with torch.device("meta"):
        model = add_recovery_adapter(base, config, plan)
    model.get_base_model().tie_weights()
    _check(narrow_file(run, "tuned"), run, {k: x.shape for k, x in model.named_parameters()})
    return model


def narrow_file(run: RunFolder, name: str) -> Path:
    """Where `save_narrow_peft` writes."""
    return run.checkpoint / f"{name}.safetensors"


def _check_trained(run: RunFolder) -> None:
    if not narrow_file(run, "tuned").exists():
        raise ValueError(f"{run.path} is not trained yet: run {run.command('train')}")


def _check(path: Path, run: RunFolder, wanted: dict[str, torch.Size]) -> None:
    """Raise ValueError for a file that is damaged, or of another plan."""
    try:
        held = tensors_of(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run {run.command('train')}") from error
    # Files of before hold the second name of a head that is tied, or the buffers.
    if any(held.get(name) != tuple(shape) for name, shape in wanted.items()):
        raise ValueError(f"{path} does not fit {run.plan}: run `atp-edge train` again")
