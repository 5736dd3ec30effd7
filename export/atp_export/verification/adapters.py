"""A LoRA that ships beside its base: its factors against peft's own, and the base with it on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from atp_export.verification.checks import Check, at_most
from atp_export.verification.places import rows_of, weights_of

# Two factors rounded to the type, over the length of their product.
FACTOR_BOUND = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}


def factors_in(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .onnx_adapter file by input name."""
    values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    # Copies: the arrays are views of memory that goes with the file read.
    return {name: np.array(value.numpy()) for name, value in values.items()}


@torch.no_grad()
def with_adapter(
    state: Mapping[str, Tensor], factors: Mapping[str, NDArray[Any]], config: Any, peft: Path
) -> tuple[dict[str, Tensor], Check]:
    """A state with the file's low-rank changes added, and how far these lie from peft's."""
    adapted, worst = dict(state), (0.0, "no projection has a LoRA")
    changes = _changes(factors, state)
    for path, expected in _deltas(peft).items():
        name = f"{path}.weight"
        change = changes.pop(name, torch.zeros_like(expected))
        off = float((change - expected).norm() / expected.norm().clamp_min(1e-30))
        off = math.inf if math.isnan(off) else off
        worst = max(worst, (off, f"the LoRA of {path} lies {off:.1e} of its length from peft's"))
        adapted[name] = state[name] + change
    if changes:
        worst = (math.inf, f"peft's adapter has no LoRA of {min(changes)}, the file has")
    bound = max(FACTOR_BOUND[factor.dtype] for factor in factors.values())
    return adapted, at_most("factors", worst[0], bound, worst[1])


def _changes(factors: Mapping[str, NDArray[Any]], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By weight, what the file's factors add to it, [out, in] in fp32."""
    changes: dict[str, Tensor] = {}
    for name in factors:
        label, _, half = name.rpartition(".")
        if half == "lora_A":
            pair = (factors[f"{label}.{which}"] for which in ("lora_A", "lora_B"))
            a, b = (torch.from_numpy(factor.astype(np.float32)) for factor in pair)
            whole, weights = (a @ b).T, weights_of(label)
            changes |= {
                w: whole[rows] for w, rows in zip(weights, rows_of(weights, state), strict=True)
            }
    return changes


def _deltas(peft: Path) -> dict[str, Tensor]:
    """s B A of every projection of a peft folder, by its path."""
    config = json.loads((peft / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = load_file(peft / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    return {
        name.removeprefix("base_model.model.").removesuffix(ending): scale
        * (tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float())
        for name in tensors
        if name.endswith(ending)
    }
