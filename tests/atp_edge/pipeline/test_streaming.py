"""Checkpoints larger than what may be held: merged, cut, exported and proven tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from atp_edge.config import Config
from atp_edge.model.checkpoint import build_on_meta
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_config
from atp_edge.model.plan import write_plan
from atp_edge.model.stream import write_tensors
from atp_edge.pipeline.cost_estimate import even_plan
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training.adapters import add_recovery_adapter, with_lora
from atp_edge.training.setup import feasible_of
from tests.synthetic import LLAMA_3B, synthetic_checkpoint

LARGEST = 4 * LLAMA_3B["vocab_size"] * LLAMA_3B["hidden_size"]
"""Bytes of the embedding in fp32."""
MOST = 2 * LARGEST + 1e9
WORKER = Path(__file__).with_name("streamed.py")
SETTINGS: dict[str, Any] = {"recovery.retrain": False, "dataset.block_tokens": 64}


def peak_of(what: str, folder: Path) -> float:
    """Bytes that a process of its own takes at most, above what it has when all is imported."""
    asked = [sys.executable, str(WORKER), what, str(folder)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["right"], found
    return float(found["peak"] - found["before"])


def source(folder: Path, layers: int) -> Path:
    """A synthetic model in shards, and a run of it up to the end of training: LoRA for the dense
    model, a plan, and the narrow model with its LoRA as training leaves it."""
    sizes = LLAMA_3B | {"num_hidden_layers": layers}
    synthetic_checkpoint(folder / "model", sizes)
    values = SETTINGS | {"model": str(folder / "model"), "out": str(folder / "run")}
    config, run = with_values(Config(), values), RunFolder(folder / "run")
    run.checkpoint.mkdir(parents=True)
    llama = LlamaConfig(**sizes)
    feasible = feasible_of(config, llama)
    plan = even_plan(model_shape(llama), feasible)
    write_plan(plan, run.plan)
    with torch.device("meta"):
        wide = with_lora(config, build_on_meta(llama))
        narrow = add_recovery_adapter(build_on_meta(narrow_config(llama, plan)), config, plan)
    factors = {name: p for name, p in wide.named_parameters() if "lora_" in name}
    write(run.checkpoint / "dense_adapter.safetensors", factors)
    write(run.checkpoint / "tuned.safetensors", dict(narrow.named_parameters()))
    (folder / "values.json").write_text(json.dumps(values))
    return folder


def write(path: Path, wanted: dict[str, Any]) -> None:
    """Random tensors of these names and shapes: what is frozen in bf16, all else in fp32."""
    draw = torch.Generator().manual_seed(0)
    kinds = {n: torch.bfloat16 if n.endswith("_proj.base_layer.weight") else torch.float32
             for n in wanted}  # fmt: skip
    described = {name: p.detach().to("meta", kinds[name]) for name, p in wanted.items()}

    def drawn(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(wanted[name].shape)
        return torch.empty(wanted[name].shape, dtype=kinds[name]).normal_(0, 0.02, generator=draw)

    write_tensors(path, described, drawn)


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_3b_is_merged_cut_and_exported_in_two_of_its_largest_tensor(tmp_path: Path) -> None:
    """All 28 layers: 6.4 GB of weights."""
    folder = source(tmp_path, LLAMA_3B["num_hidden_layers"])
    peaks = {what: peak_of(what, folder) for what in ("merge", "shrink", "export")}
    assert max(peaks.values()) <= MOST, peaks
    shards = sorted((tmp_path / "run/dense").glob("*.safetensors"))
    assert len(shards) == 1  # transformers' own limit is 50 GB
    assert json.loads((tmp_path / "run/slim/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_3b_wide_layers_are_rounded_by_gptq_and_proven_one_at_a_time(tmp_path: Path) -> None:
    """Three layers, for each is read and let go alike: gptq's grams of 28 take hours on two
    cores."""
    folder = source(tmp_path, 3)
    peak_of("shrink", folder)
    peaks = {what: peak_of(what, folder) for what in ("gptq", "verify")}
    assert peaks["gptq"] <= MOST, peaks
    # The embedding is there five times: PyTorch's, the file's, the faint one, and in the session as
    # its rows are gathered and as the head's product packs it. And a layer in each.
    assert peaks["verify"] <= 5 * LARGEST + 2e9, peaks
