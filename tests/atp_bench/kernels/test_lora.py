"""One masked LoRA layer: every rival is right, and a wrong one has no speed."""

from __future__ import annotations

import io

import pytest
from atp_bench.kernels import lora
from atp_bench.kernels.lora import LoraCase, bench_lora, error_of, make_inputs
from atp_bench.kernels.roofline import roofline
from atp_bench.kernels.tables import lora_table
from rich.console import Console

CASE = LoraCase(in_features=24, out_features=40, rank=4, tokens=16, kept=0.6, dtype="fp32")


def test_every_rival_is_right_and_a_wrong_one_gets_no_speedup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = bench_lora(CASE, rounds=1, device="cpu", compiled=False)
    for name, row in measured["rows"].items():
        assert row["speedup"] > 0, name
        assert row["error"] < 1e-5, name
    made = make_inputs(CASE, "cpu")
    assert error_of(lambda x: lora.ours(made)(x) * 1.01, made) == pytest.approx(0.01, rel=1e-2)
    monkeypatch.setattr(lora, "sliced", lambda made: lora.addmm(make_inputs(
        LoraCase(in_features=24, out_features=40, rank=4, tokens=16, kept=0.5, dtype="fp32"), "cpu"
    )))  # fmt: skip
    row = bench_lora(CASE, rounds=1, device="cpu", compiled=False)["rows"]
    assert row["weights sliced beforehand"]["speedup"] is None
    assert row["ours, narrow output"]["speedup"] > 0


def test_the_narrow_path_keeps_less_for_the_backward() -> None:
    rows = bench_lora(CASE, rounds=1, device="cpu", compiled=False)["rows"]
    narrow = rows["ours, narrow output"]["memory_bytes"]
    assert 0 < narrow < rows["ours, masked output"]["memory_bytes"]


def test_tables_and_the_roofline_page() -> None:
    measured = bench_lora(CASE, rounds=1, device="cpu", compiled=False)
    measured["rows"]["addmm"] |= {"speedup": None, "flops_per_s": None, "error": 0.5}
    console = Console(width=80, file=io.StringIO())
    console.print(lora_table(measured))
    assert "wrong by 5e-01" in console.file.getvalue()  # type: ignore[attr-defined]
    figures = {
        "cases": [measured],
        "roofs": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "settings": {"dtype": "fp32", "device": "cpu"},
    }
    page = roofline(figures)
    assert "ours, narrow output" in page
    assert "roof (measured)" in page
