"""Killed at random, 30 times: `make soak` kills the later stages too, and as often as is asked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from atp_edge.config import Config
from tests.soak import kills
from tests.soak.kills import Kill, by_stage, kills_of, lost_of, with_lost

ROOT = Path(__file__).parents[2]


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it forks."""
    return subprocess.run(
        [sys.executable, "-m", "tests.soak.kills", "--folder", str(folder), *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True,
        text=True,
    )  # fmt: skip


def test_killed_at_random_every_run_ends_as_the_one_that_nobody_killed(tmp_path: Path) -> None:
    seed = str(random.SystemRandom().randrange(1 << 30))
    done = soak(tmp_path, "--count", "30", "--last", "export", "--seed", seed)
    assert done.returncode == 0, (seed, done.stdout, done.stderr[-3000:])
    told = kills_of(tmp_path / "kills.jsonl")
    assert len(told) >= 30
    assert len({kill.stage for kill in told}) > 2
    assert f"| all | {len(told)} |" in done.stdout


def test_more_than_what_came_after_the_checkpoint_is_no_survival() -> None:
    kill = Kill(stage="recover", seconds=1.0, resumes=0)
    steps = [("recovery", step) for step in range(5)]
    assert with_lost([kill], [5], [*steps, *steps[3:]])[0].lost == 2
    with pytest.raises(RuntimeError, match="3 steps were done again"):
        with_lost([kill], [5], [*steps, *steps[2:]])
    assert lost_of(("dense", 3), ("control", 0)) == 0
    with pytest.raises(RuntimeError, match="it went on with"):
        lost_of(("recovery", 0), ("control", 7))
    assert "| `recover` | 1 | 0 | 2 |" in by_stage(with_lost([kill], [5], [*steps, *steps[3:]]))


def test_a_run_that_ends_in_an_error_is_no_survival(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("no rows, and no model beside it")
    done = soak(tmp_path, "--count", "1")
    assert done.returncode == 1
    assert "no config.json there" in done.stderr


def test_a_run_that_ended_before_its_kill_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same moment was drawn again, and again, until the run happened to be slower."""
    moments: list[float] = []

    def attempt(config: Config, stages: object, log: Path, seconds: float | None) -> bool:
        if seconds is not None:
            moments.append(seconds)
        assert len(moments) < 1000
        return seconds is None or seconds > 1

    monkeypatch.setattr(kills, "attempt", attempt)
    monkeypatch.setattr(kills, "source_in", lambda folder: Config())
    monkeypatch.setattr(kills, "outcome", lambda config: {})
    monkeypatch.setattr(kills, "undone", lambda config: "train")
    (tmp_path / "seconds").write_text("10")
    assert len(list(kills.soak(tmp_path, ["train"], 5, seed=0))) >= 5
    assert max(moments) > 1
