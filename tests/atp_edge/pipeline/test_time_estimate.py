"""What `--dry-run` says of time, from one pass that was timed, and of longer runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from atp_edge.config import Config
from atp_edge.pipeline import time_estimate
from atp_edge.pipeline.device import Device
from atp_edge.pipeline.time_estimate import MEASURED_BY_TOKENS, stage_seconds, time_lines
from atp_edge.run.records import STAGES
from atp_edge.settings import configured
from atp_edge.training.setup import splits_of
from tests.tiny import QUICK_TO_TRAIN

ROOT = Path(__file__).parents[3]


def test_every_stage_has_its_time_and_more_work_takes_more() -> None:
    short, long = Config(steps=10), Config(steps=20)
    found = stage_seconds(short, STAGES, 2.0, 40)
    assert tuple(found) == STAGES
    assert found["train"] < stage_seconds(long, STAGES, 2.0, 40)["train"]
    assert found["train"] > stage_seconds(short, STAGES, 2.0, 5)["train"]
    assert found["gate"] == 2 * stage_seconds(short, STAGES, 1.0, 40)["gate"]


def test_what_longer_runs_gave_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "bench/results/quality-cpu.json").read_text())["results"]
    asked = {"method": "atp", "domain": "legal", "seed": 0, "share": 0.6, "widths": "per-layer"}
    found = {
        (row["tokens"], round(row["recovery"], 3))
        for row in rows
        if asked.items() <= row["cell"].items()
    }
    assert found == set(MEASURED_BY_TOKENS)


def test_a_pass_is_timed_unless_the_model_is_too_large_for_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"model": str(source / "model"), "data": str(source / "data.jsonl")}
    short = {"steps": 4, "dataset.block_tokens": 16}
    config = configured(QUICK_TO_TRAIN | named | short)
    device = Device(kind="cpu", name="this CPU", memory=1e10, host=1e10, disk=1e10, quantizes=False)
    said, longer = time_lines(config, STAGES, splits_of(config), device)
    assert said.startswith("time, roughly: ")
    assert "this one reads 64 tokens" in longer
    monkeypatch.setattr(time_estimate, "load_dense", None)
    small = replace(device, memory=1e6)
    assert "not estimated" in time_lines(config, STAGES, splits_of(config), small)[0]
