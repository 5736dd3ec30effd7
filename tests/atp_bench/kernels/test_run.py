"""`bench kernels` as a whole: what it refuses, and what a kill leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from atp_bench.kernels.run import KernelSettings, bench_kernels

from atp_edge.run.files import read_json, write_json

SETTINGS = KernelSettings(
    shapes="small", tokens=(2,), ranks=(2,), kept=(0.5,), dtype="fp32", rounds=1, device="cpu",
    compiled=False,
)  # fmt: skip


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="rounds 0"):
        replace(SETTINGS, rounds=0)


def test_what_was_measured_before_a_kill_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"

    def killed(said: str) -> None:
        if "1536 -> 576" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_kernels(SETTINGS, progress=killed, keep=lambda figures: write_json(file, figures))
    kept = read_json(file)
    assert [case["case"]["out_features"] for case in kept["cases"]] == [576, 1536]
    assert kept["roofs"]["flops_per_s"] > 0
