"""`bench training`: what it measures, and what it refuses to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_bench import training
from atp_bench.acceptance.sizes import SMOLLM2
from atp_bench.learned_widths import learned_masks
from atp_bench.training import bench_training
from transformers import LlamaConfig
from typer.testing import CliRunner

from atp_edge.cli.bench import bench
from atp_edge.decision.budget import feasible_decisions, parse_budget
from atp_edge.model.families import model_shape
from atp_edge.model.structures import sites_of
from tests.tiny import tiny_model

SETTINGS: dict[str, Any] = {
    "kept": 0.6, "tokens": 16, "rank": 16, "rounds": 1, "precisions": ("fp32", "bf16"),
    "device": "cpu",
}  # fmt: skip


def folder_of_a_model(path: Path) -> str:
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    tiny_model("llama", **sizes).save_pretrained(path)
    return str(path)


def test_training_writes_its_ratios_and_how_they_came_about(tmp_path: Path) -> None:
    model, out = folder_of_a_model(tmp_path / "model"), tmp_path / "figures.json"
    done = CliRunner().invoke(
        bench,
        [
            "training",
            "--model",
            model,
            "--tokens",
            "32",
            "--rounds",
            "2",
            "--run-rounds",
            "1",
            "--json",
            str(out),
        ],
        catch_exceptions=False,
    )
    figures = json.loads(out.read_text())
    assert figures["gradients_equal"]
    assert 0.5 < figures["kept_share"] <= 0.6
    ours = figures["rows"]["fp32"]["kept alone"]
    assert figures["decoder_step_ratio_60"] == ours["decoder_step_ratio"] > 0
    assert figures["lora_step_ratio_60"] == ours["lora_step_ratio"] > 0
    low, high = ours["lora_step_ratio_quartiles"]
    assert low < ours["lora_step_ratio"] < high
    assert f"{low:.2f}-{high:.2f}" in done.output
    assert figures["rows"]["bf16"].keys() == figures["rows"]["fp32"].keys()
    assert figures["rows"]["fp32"]["all kept"]["lora_step_ratio"] == 1.0
    run = figures["run_steps"]["rows"]
    assert run.keys() == {"dense LoRA step", "joint step", "recovery step"}
    assert run["joint step"]["ratio"] > run["dense LoRA step"]["ratio"] == 1.0
    assert "A run's own steps" in done.output
    assert f"lora_step_ratio_60 = {figures['lora_step_ratio_60']:.3f}" in done.output


def test_no_ratio_where_a_gradient_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.gradients
    calls: list[int] = []

    def wrong(made: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {name: g * (1.01 if len(calls) == 1 else 1) for name, g in right(made).items()}

    monkeypatch.setattr(training, "gradients", wrong)
    folder = folder_of_a_model(tmp_path)
    figures = bench_training(folder, **SETTINGS | {"precisions": ("fp32",)})
    assert figures["decoder_step_ratio_60"] is figures["lora_step_ratio_60"] is None
    assert max(figures["largest_gradient_error"].values()) == pytest.approx(0.01, rel=1e-3)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"kept 0, tokens 1.*expected 0 < kept <= 1"):
        bench_training("nowhere", **SETTINGS | {"kept": 0, "tokens": 1})


def test_a_learned_plans_widths_are_those_of_its_model_and_share_alone() -> None:
    shape = model_shape(LlamaConfig(**SMOLLM2))
    masks = learned_masks(sites_of(shape), 0.6)
    assert masks is not None
    feasible = feasible_decisions(
        shape, parse_budget("params=0.6"), widths="per-layer", width_multiple=32
    )
    assert 0.59 < float(feasible.kept_share([mask.float() for mask in masks])) <= 0.6
    assert learned_masks(sites_of(shape), 0.5) is None
    assert learned_masks(sites_of(shape)[:-2], 0.6) is None
