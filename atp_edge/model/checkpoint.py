"""Narrow models as Hugging Face checkpoints.

Uniform widths are an ordinary checkpoint. Per-layer widths carry transformers' `per_layer_config`
and the modelling file that reads it (see atp_edge.model.modeling_per_layer).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp_edge.model import modeling_per_layer
from atp_edge.model.families import ModelShape
from atp_edge.model.loading import (
    GENERATION,
    load_config,
    load_model,
    shape_in,
    stored_type,
    tensor_files,
)
from atp_edge.model.narrow import build_model
from atp_edge.model.stream import (
    MAX_SHARD,
    Read,
    computing_in_fp32,
    fill,
    reader_of,
    streamed,
    without_weights,
    write_weights,
)
from atp_edge.model.transformers4 import add_legacy_keys
from atp_edge.run.files import folder_atomically, write_json


def save_narrow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    like: Path | None = None,
) -> None:
    """Write a checkpoint beside `folder` and rename it into place.

    like: a checkpoint whose generation settings (end tokens!) and type of weights it takes over.
    """
    dtype = stored_type(like) if like else model.dtype
    state = dict(model.named_parameters())  # tied ones once
    write_checkpoint(
        model, lambda name: state[name].detach(), tokenizer, folder, like=like, dtype=dtype
    )


def write_checkpoint(
    model: PreTrainedModel,
    read: Read,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    dtype: torch.dtype,
    like: Path | None = None,
    max_shard: int | str = MAX_SHARD,
) -> None:
    """Write a checkpoint beside `folder` and rename it into place, one tensor in memory at a time.

    model: for its configuration, names and shapes alone; it may be on the meta device. read: the
    values by name, which are rounded to dtype.
    """
    described = {n: x.detach().to("meta", dtype) for n, x in model.named_parameters()}
    settings = like / GENERATION if like and (like / GENERATION).is_file() else None
    with folder_atomically(folder) as beside:
        with _plain_generation(model) if settings else nullcontext():
            model.save_pretrained(beside, state_dict={})
        (beside / "model.safetensors").unlink(missing_ok=True)
        write_weights(beside, described, lambda name: read(name).to(dtype), max_shard=max_shard)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if settings:
            shutil.copyfile(settings, beside / GENERATION)
        _state_type(beside / "config.json", dtype)
        if model.config.is_heterogeneous:
            _ship_modelling_file(model, beside)
        add_legacy_keys(beside)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """The model with plain generation settings: of those that it reads (a temperature without
    sampling), transformers below 5.23 refuses to save some."""
    settings, plain = model.generation_config, GenerationConfig.from_model_config(model.config)
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = settings


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with weights that `dtype` holds exactly, in the type that they are computed in:
    what is measured of it is true of its checkpoint."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


def _state_type(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, config | {"dtype": str(dtype).removeprefix("torch.")})


def _ship_modelling_file(model: PreTrainedModel, folder: Path) -> None:
    source = Path(modeling_per_layer.__file__)
    shutil.copy(source, folder / source.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decoder = type(model.get_decoder()).__name__
    named = {
        "AutoModel": f"{source.stem}.PerLayer{decoder}",
        "AutoModelForCausalLM": f"{source.stem}.{type(model).__name__}",
    }
    write_json(folder / "config.json", config | {"auto_map": named})


def shape_of(folder: Path) -> ModelShape:
    """The sizes of the decoder in a checkpoint's folder."""
    return shape_in(folder, load_config(folder))


def load_narrow(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint of either widths policy. Raises ValueError when it is not a whole one."""
    return load_model(folder, dtype=dtype)


def streamed_narrow(folder: Path, device: torch.device) -> PreTrainedModel:
    """A checkpoint in fp32 that holds a layer's weights only while that layer computes."""
    model, read = load_narrow_parts(folder)
    model.requires_grad_(False)  # Else autocast keeps a copy of every weight that went by.
    streamed(model, read, device)
    model.get_submodule("model.rotary_emb").to(device)
    return model


def load_as_stored(folder: Path, device: torch.device | str) -> PreTrainedModel:
    """A checkpoint to evaluate that computes what `load_narrow`'s does, in fp32 a layer at a time,
    and holds weights in the type that they are stored in."""
    model, read = load_narrow_parts(folder)
    model.requires_grad_(False).tie_weights()
    names = [name for name, _ in model.named_parameters()]
    fill(model, names, lambda name: read(name).to(device))
    model.tie_weights()
    computing_in_fp32(model.to(device))
    return model


def load_narrow_parts(folder: Path) -> tuple[PreTrainedModel, Read]:
    """A checkpoint's model without its weights, and what reads them by name."""
    with without_weights():
        model = build_model(load_config(folder), torch.float32)
    return model.eval(), reader_of(tensor_files(folder))


def build_on_meta(config: object) -> PreTrainedModel:
    """The model without memory for its weights: for its class and its shapes."""
    with torch.device("meta"):
        return build_model(config, torch.float32)
