"""Trackers by accelerate's classes: what is logged, and what cannot be had is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from atp_edge.config import Config
from atp_edge.run.history import Record
from atp_edge.training import trackers
from atp_edge.training.trackers import Tracked, check_tracker
from tests.tiny import Silent


class Remembers:
    requires_logging_directory = True

    def __init__(self, name: str, logging_dir: str) -> None:
        self.name, self.folder = name, logging_dir
        self.logged: list[tuple[int, Mapping[str, Any]]] = []
        self.ended = False

    def start(self) -> None: ...

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.settings = values

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended = True


def test_steps_are_logged_by_their_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Remembers)
    tracked = Tracked(Silent(), "tensorboard", Config(out="runs/x"))
    tracked.record(Record(step=3, phase="dense", loss=2.0, lr=0.1, tokens=1))
    tracked.finish({"perplexity": 20.0})
    made = tracked.tracker
    assert made.folder == "runs/x"
    assert made.settings["lora.rank"] == 16
    assert made.logged == [(3, {"dense/loss": 2.0, "dense/lr": 0.1}), (0, {"run/perplexity": 20.0})]
    assert made.ended


def test_what_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--track comet: expected tensorboard, wandb, mlflow"):
        check_tracker("comet")
    monkeypatch.setitem(trackers.AVAILABLE, "wandb", lambda: False)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_tracker("wandb")
