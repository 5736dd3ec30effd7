"""Progress for machines: every line is an object with its event."""

from __future__ import annotations

import json
import math

import pytest

from atp_edge.run.history import Record
from atp_edge.run.json_lines import JsonLines
from atp_edge.run.watched import counted, tell_expected, tell_stage, watched_by


def test_every_line_is_an_event_with_its_time() -> None:
    lines: list[str] = []
    shown = JsonLines(lines.append)
    with watched_by(shown):
        tell_expected([("train", 1.0), ("joint", 4.0)])
        tell_stage("train", 1, 6)
        shown.say("reading")
        for _ in counted(range(2), "scoring"):
            list(counted(range(2), "measuring"))
        shown.phase("joint", 0, 4, 0.6)
        shown.record(Record(step=0, phase="control", loss=2.5, lr=0.1, tokens=512))
    events = [json.loads(line) for line in lines]
    assert [e["event"] for e in events] == ["stage", "say", "work", "phase", "step"]
    assert all(e["time"] > 0 for e in events)
    assert events[0] | {"time": 0} == {
        "time": 0, "event": "stage", "name": "train", "number": 1, "of": 6,
    }  # fmt: skip
    assert (events[-1]["loss"], events[-1]["step"]) == (2.5, 0)


def test_a_number_that_is_none_is_null() -> None:
    """Of a step that diverged: no parser but Python's reads NaN."""
    lines: list[str] = []
    shown = JsonLines(lines.append)
    shown.phase("joint", 0, 4, 0.6)
    shown.record(Record(step=0, phase="control", loss=math.nan, lr=0.1, tokens=512))
    shown.put("end", metrics={"train": {"block_losses": [1.0, math.inf]}})
    step, end = (json.loads(line, parse_constant=pytest.fail) for line in lines[1:])
    assert step["loss"] is None
    assert end["metrics"] == {"train": {"block_losses": [1.0, None]}}
