"""Narrow models as Hugging Face checkpoints.

Uniform widths are an ordinary checkpoint. Per-layer widths carry transformers' `per_layer_config`
and the modelling file that reads it (see atp_edge.model.modeling_per_layer).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp_edge.model import modeling_per_layer
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.narrow import build_model
from atp_edge.run.files import folder_atomically, write_atomically


def save_narrow(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write a checkpoint beside `folder` and rename it into place."""
    with folder_atomically(folder) as beside:
        model.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if model.config.is_heterogeneous:
            _ship_modelling_file(model, beside)


def _ship_modelling_file(model: PreTrainedModel, folder: Path) -> None:
    source = Path(modeling_per_layer.__file__)
    shutil.copy(source, folder / source.name)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{source.stem}.{type(model).__name__}"}
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def shape_of(folder: Path) -> ModelShape:
    """The sizes of the decoder in a checkpoint's folder."""
    return model_shape(AutoConfig.from_pretrained(folder))


def check_weights(folder: Path) -> None:
    """Raise ValueError naming a weights file of a checkpoint that is cut or something else."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file} is cut, or no safetensors file ({error}): fetch or write it again"
            ) from error


def load_narrow(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint of either widths policy. Raises ValueError when it is not a whole one."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: expected a Hugging Face checkpoint")
    config = AutoConfig.from_pretrained(folder)
    model_shape(config)
    check_weights(folder)
    model_class = type(build_on_meta(config))
    model: PreTrainedModel = model_class.from_pretrained(folder, config=config, dtype=dtype)
    return model.eval()


def build_on_meta(config: object) -> PreTrainedModel:
    """The model without memory for its weights: for its class and its shapes."""
    with torch.device("meta"):
        return build_model(config, torch.float32)
