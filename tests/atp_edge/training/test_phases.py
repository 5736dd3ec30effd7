"""The parts of the train stage that are functions of their own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from atp_edge.config import Config
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.settings import with_values
from atp_edge.training import phases, teacher
from atp_edge.training.adapters import add_recovery_adapter, redistributed_ranks
from atp_edge.training.frozen import frozen_kind, load_frozen
from atp_edge.training.phases import run_part
from atp_edge.training.setup import TrainContext, accelerate, splits_of
from tests.tiny import (
    QUICK_TO_TRAIN,
    Silent,
    dense_run,
    logits,
    per_layer_plan,
    tiny_model,
    with_lora,
)


@pytest.mark.parametrize("adapter", ["ranks", "dora"])
def test_an_adapter_begun_anew_changes_nothing_and_then_learns(adapter: str) -> None:
    dense = with_lora(tiny_model("qwen3"))
    plan = per_layer_plan(dense.get_base_model())
    merged = merge(narrow_peft(dense, plan))
    expected = logits(merged)
    config = with_values(Config(), {"recovery.adapter": adapter, "lora.rank": 8})
    renewed = add_recovery_adapter(merged, config, plan)
    torch.testing.assert_close(logits(renewed), expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        for name, parameter in renewed.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    learned = logits(renewed)
    assert (learned - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(merge(renewed)), learned, atol=2e-5, rtol=1e-5)


def test_ranks_follow_what_was_cut_and_keep_their_mean() -> None:
    # Kept of layers 0 to 2: 2, 1 and 3 of 3 groups; 4, 40 and 1 of 40 channels.
    plan = per_layer_plan(tiny_model("llama"))
    ranks = redistributed_ranks(plan, 16)
    down = [ranks[f"model.layers.{i}.mlp.down_proj"] for i in range(3)]
    assert down[2] > down[0] > down[1] == 4
    assert len(ranks) == 3 * 7
    sites = [ranks[f"model.layers.{i}.{p}"] for i in range(3)
             for p in ("self_attn.q_proj", "mlp.up_proj")]  # fmt: skip
    assert sum(sites) / len(sites) == pytest.approx(16, abs=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_takes_half_the_memory_and_says_the_same(tied: bool, tmp_path: Path) -> None:
    ids = torch.arange(40).view(2, 20)
    save_narrow(tiny_model("llama-biases", tied=tied), None, tmp_path / "dense")

    def said(precision: str) -> tuple[torch.Tensor, int]:
        kind = frozen_kind(with_values(Config(), {"train.precision": precision}))
        taught_by = load_frozen(tmp_path / "dense", kind, torch.device("cpu"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = taught_by(ids).logits
        layers = taught_by.model.layers.parameters()
        return logits, sum(p.nbytes for p in layers if p.ndim == 2)

    (plain, whole), (kept, half) = said("no"), said("bf16")
    assert torch.equal(plain, kept)
    assert whole == 2 * half


def test_no_part_holds_the_optimizers_of_the_one_before(
    real_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimizers() -> int:
        gc.collect()
        return sum(isinstance(found, AdamW) for found in gc.get_objects())

    alive = []
    for module, name in ((teacher, "match_teacher"), (phases, "drive")):
        real = getattr(module, name)

        def watched(*arguments: Any, name: str = name, real: Any = real) -> Any:
            alive.append((name, optimizers() - before))
            return real(*arguments)

        monkeypatch.setattr(module, name, watched)
    run = dense_run(tmp_path, real_folder, steps=4, **QUICK_TO_TRAIN)
    config = run.config()
    splits, accelerator = splits_of(config), accelerate(config)
    before = optimizers()
    context = TrainContext(
        config=config, run=run, splits=splits, accelerator=accelerator, progress=Silent()
    )
    for part in ("learn_decision", "recover"):
        run_part(part, context)
    # Of the joint loop LoRA's with the kept weights', and the generator's.
    assert alive == [("match_teacher", 2), ("drive", 2), ("match_teacher", 0), ("drive", 1)]
    assert optimizers() == before
