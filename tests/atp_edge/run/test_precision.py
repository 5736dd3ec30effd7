"""What training computes in where it was not said: what this machine is fast in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from atp_edge.config import Config
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import device_of
from atp_edge.pipeline.fit import fitted
from atp_edge.run import precision
from atp_edge.run.precision import cpu_computes_bf16, precision_of, settled, what_is_slow
from atp_edge.settings import configured, with_values
from atp_edge.training.frozen import check_base


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bf16", lambda: False)


def seconds(kind: torch.dtype) -> float:
    x, w = torch.randn(256, 576).to(kind), torch.randn(1536, 576).to(kind)
    found = []
    for _ in range(7):
        began = time.perf_counter()
        F.linear(x, w)
        found.append(time.perf_counter() - began)
    return min(found)


def test_a_cpu_is_said_to_compute_in_bf16_where_it_is_fast_in_it() -> None:
    """Without instructions for it, 7 times as long as fp32; with them, half."""
    assert (seconds(torch.bfloat16) < 2 * seconds(torch.float32)) == cpu_computes_bf16()


@pytest.mark.usefixtures("old_cpu")
def test_auto_is_fp32_where_bf16_is_slow_and_is_written_down() -> None:
    assert precision_of(Config(), "cpu") == "no"
    assert precision_of(Config(), "cuda") == "bf16"
    assert settled(Config(), "cpu").train.precision == "no"
    assert "AVX512-BF16" in (what_is_slow(settled(Config(), "cpu"), "cpu") or "")


@pytest.mark.usefixtures("old_cpu")
def test_what_was_said_stays_and_is_told_to_be_slow() -> None:
    asked = configured({"train.precision": "bf16"})
    assert settled(asked, "cpu") == asked
    assert "--train-precision no" in (what_is_slow(asked, "cpu") or "")
    assert what_is_slow(asked, "cuda") is None
    kept = configured({"train.base_dtype": "bf16", "recovery.retrain": False})
    assert precision_of(kept, "cpu") == "bf16", "weights are kept in what is computed in"
    said = what_is_slow(settled(kept, "cpu"), "cpu") or ""
    assert said.endswith("--train-precision no --train-base-dtype auto")
    check_base(with_values(kept, {"train.precision": "no", "train.base_dtype": "auto"}))


def test_a_cpu_that_computes_in_bf16_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bf16", lambda: True)
    assert precision_of(Config(), "cpu") == "bf16"
    assert what_is_slow(settled(Config(), "cpu"), "cpu") is None


@pytest.mark.usefixtures("old_cpu")
def test_of_a_gpu_elsewhere_bf16_is_counted(tmp_path: Path) -> None:
    config = configured({"model": "demo"})
    found, _ = fitted(config, sized_model(config), (), device_of("80GB", tmp_path))
    assert found.train.precision == "bf16"
