"""A LoRA kept apart from its base: peft's folder -> one `.onnx_adapter` file.

A base exported with `adapters` takes the factors of every projection as optional inputs, so that
one slim model serves several domains: ONNX Runtime reads the file and feeds them
(`Session(folder, adapter=file)` here, `add_active_adapter` elsewhere). Without one, the base
answers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx.helper import tensor_dtype_to_np_dtype
from safetensors.torch import load_file
from torch import Tensor

from atp_edge.model.storage import projections_named

_PREFIX = "base_model.model."


def write_adapter(peft: Path, base: Path, out: Path) -> int:
    """Write `out` from a peft folder for the exported folder `base`; returns the number of factors.

    The scale is multiplied into B. Projections that the base packs get their A side by side and
    their B on a diagonal. Raises ValueError when the folders do not belong together.
    """
    config = json.loads((peft / "adapter_config.json").read_text())
    factors = load_file(peft / "adapter_model.safetensors")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    graph = onnx.load(base / "model.onnx", load_external_data=False).graph
    inputs = {i.name: i.type.tensor_type for i in graph.input if i.name.endswith(".lora_A")}
    if not inputs:
        raise ValueError(f"{base} takes no adapters: export it with adapters")
    values: dict[str, Any] = {}
    used: set[str] = set()
    for name, kind in inputs.items():
        label = name.removesuffix(".lora_A")
        pairs = [_factors(factors, path, used) for path in projections_named(label)]
        a, b = _packed(pairs, scale)
        if a.shape[0] != kind.shape.dim[0].dim_value:
            raise ValueError(
                f"{peft} has {a.shape[0]} inputs at {label}, {base} has "
                f"{kind.shape.dim[0].dim_value}: it was trained on another base"
            )
        dtype = tensor_dtype_to_np_dtype(kind.elem_type)
        for half, tensor in (("lora_A", a), ("lora_B", b)):
            array = tensor.contiguous().numpy().astype(dtype)
            values[f"{label}.{half}"] = ort.OrtValue.ortvalue_from_numpy(array)
    unused = sorted(set(factors) - used)
    if unused:
        raise ValueError(f"{peft} holds {unused[0]}, for which {base} has no place")
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(out))
    return len(values)


def _factors(factors: dict[str, Tensor], path: str, used: set[str]) -> tuple[Tensor, Tensor]:
    names = [f"{_PREFIX}{path}.lora_{half}.weight" for half in "AB"]
    missing = [name for name in names if name not in factors]
    if missing:
        raise ValueError(f"the adapter has no {missing[0]}: it must cover every projection")
    used.update(names)
    return factors[names[0]].float(), factors[names[1]].float()


def _packed(pairs: list[tuple[Tensor, Tensor]], scale: float) -> tuple[Tensor, Tensor]:
    """A [in, sum of r] and B [sum of r, sum of out] of projections that share their input."""
    a = torch.cat([a for a, _ in pairs]).T
    return a, torch.block_diag(*[b.T * scale for _, b in pairs])
