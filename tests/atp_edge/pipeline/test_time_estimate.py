"""What `--dry-run` says of time, from one pass that was timed, and of longer runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atp_edge.config import Config
from atp_edge.pipeline import time_estimate
from atp_edge.pipeline.device import Device
from atp_edge.pipeline.time_estimate import (
    LITTLE_TEXT,
    MEASURED_BY_DOCUMENTS,
    MEASURED_BY_TOKENS,
    stage_seconds,
    time_lines,
)
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


OURS = {"method": "atp", "domain": "legal", "seed": 0, "share": 0.6, "widths": "per-layer"}


def measured(file: str) -> list[dict[str, Any]]:
    rows = json.loads((ROOT / "bench/results" / file).read_text())["results"]
    return [row for row in rows if OURS.items() <= row["cell"].items()]


def test_what_longer_runs_gave_is_what_was_measured() -> None:
    found = {(row["tokens"], round(row["recovery"], 3)) for row in measured("quality-cpu.json")}
    assert found == set(MEASURED_BY_TOKENS)


def test_what_little_text_gave_is_what_was_measured() -> None:
    rows = [row for row in measured("quality-cpu.json") if row["tokens"] == 102_400]
    rows += measured("quality-cpu-documents.json")
    found = {(row["cell"]["documents"] or 1_623, round(row["recovery"], 3)) for row in rows}
    assert found == {(documents, recovery) for documents, _, recovery in MEASURED_BY_DOCUMENTS}
    assert {row["tokens"] for row in rows} == {102_400}


def test_a_pass_is_timed_unless_the_model_is_too_large_for_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"model": str(source / "model"), "data": str(source / "data.jsonl")}
    short = {"steps": 4, "dataset.block_tokens": 16}
    config = configured(QUICK_TO_TRAIN | named | short)
    device = Device(kind="cpu", name="this CPU", memory=1e10, host=1e10, disk=1e10, quantizes=False)
    splits = splits_of(config)
    said, longer, more = time_lines(config, STAGES, splits, device)
    assert said.startswith("time, roughly: ")
    assert "this one reads 64 tokens" in longer
    assert f"has {splits.report.tokens['train']:,} tokens" in more
    enough = replace(splits.report, tokens=splits.report.tokens | {"train": LITTLE_TEXT})
    assert len(time_lines(config, STAGES, replace(splits, report=enough), device)) == 2
    monkeypatch.setattr(time_estimate, "load_dense", None)
    small = replace(device, memory=1e6)
    assert "not estimated" in time_lines(config, STAGES, splits_of(config), small)[0]
