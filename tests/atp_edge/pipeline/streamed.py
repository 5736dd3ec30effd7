"""`streamed.py WHAT FOLDER`: one step of a run in a process of its own, and the memory it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from atp_export.export import export_onnx
from atp_export.verification.by_layers import verify_by_layers
from safetensors.torch import load_file

from atp_edge.config import Config
from atp_edge.model.loading import read_tensor, tensor_files
from atp_edge.pipeline.shrink import _write_slim
from atp_edge.run.folder import RunFolder
from atp_edge.run.peak_memory import resident_peak, set_back
from atp_edge.settings import with_values
from atp_edge.training import phases
from atp_edge.training.teacher import dense_adapter_file


class Numbers:
    """A tokenizer of numbers."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(t) if t.isdigit() else 0 for t in text.split()]}


def done(what: str, config: Config, run: RunFolder) -> bool:
    """The step; whether it left what it should."""
    if what == "merge":
        context: Any = SimpleNamespace(config=config, run=run)
        phases.tokenizer_of = lambda _: None  # type: ignore[assignment]
        phases._write_dense(load_file(dense_adapter_file(run)), context)
        return _merged(config, run)
    if what == "shrink":
        slim: Any = None
        if not run.dense.exists():  # For its type, and its generation settings.
            run.dense.symlink_to(Path(config.model).resolve())
        _write_slim(config, run, slim)
        return (run.slim / "config.json").is_file()
    if what in ("export", "gptq"):
        ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
        quantizer: Any = "nearest" if what == "export" else "gptq"
        calibration = ids if what == "gptq" else None
        export_onnx(run.slim, run.onnx, precision="int4", quantizer=quantizer,
                    calibration=calibration, context=512)  # fmt: skip
        return (run.onnx / "model.onnx").is_file()
    report = verify_by_layers(run.onnx, run.slim, Numbers(), ["1 2 3 4 5", "9 8 7 6"], layers=3,
                              at_once=1, new_tokens=4, precision="int4")  # fmt: skip
    return report.passed


def _merged(config: Config, run: RunFolder) -> bool:
    """W + s B A of one projection, computed by hand."""
    name, source = "model.layers.1.mlp.up_proj.weight", tensor_files(Path(config.model))
    adapter = load_file(dense_adapter_file(run))
    path = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (adapter[f"{path}.lora_{factor}.default.weight"] for factor in "AB")
    scale = config.lora.alpha / config.lora.rank
    wanted = read_tensor(name, source[name]).float() + scale * (b @ a)
    held = read_tensor(name, tensor_files(run.dense)[name])
    return torch.equal(held, wanted.to(held.dtype))


torch.set_num_threads(1)
step, folder = sys.argv[1], Path(sys.argv[2])
settings = with_values(Config(), json.loads((folder / "values.json").read_text()))
set_back()
before = resident_peak()
right = done(step, settings, RunFolder(Path(settings.out)))
sys.stdout.write(json.dumps({"right": right, "before": before, "peak": resident_peak()}) + "\n")
