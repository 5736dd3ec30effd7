"""A run's steps in an experiment tracker, by accelerate's own classes for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available

from atp_edge.config import Config, Tracker
from atp_edge.run.history import Record
from atp_edge.run.progress import Progress
from atp_edge.settings import values_of

AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}
PROJECT = "atp-edge"


def check_tracker(name: str) -> Tracker:
    """Raise ValueError for one that is unknown, or whose package is not installed."""
    for known in get_args(Tracker):
        if name == known:
            if not AVAILABLE[name]():
                raise ValueError(f"--track {name}: pip install {name}, it is not installed here")
            return known
    raise ValueError(f"--track {name}: expected {', '.join(get_args(Tracker))}")


class Tracked:
    """Progress that is shown by another, and tracked: a value a step, and the last figures."""

    def __init__(self, shown: Progress, name: Tracker, config: Config) -> None:
        self.shown = shown
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = {"logging_dir": config.out} if kind.requires_logging_directory else {}
        self.tracker: Any = kind(PROJECT, **folder)
        self.tracker.start()
        self.tracker.store_init_configuration(values_of(config))

    def say(self, text: str) -> None:
        self.shown.say(text)

    def phase(self, name: str, first: int, last: int, target_share: float | None) -> None:
        self.shown.phase(name, first, last, target_share)

    def record(self, record: Record) -> None:
        values = {
            "loss": record.loss,
            "lr": record.lr,
            "kept_share": record.kept_share,
            "decision_loss": record.decision_loss,
            "validation_loss": record.validation_loss,
        }
        named = {f"{record.phase}/{k}": v for k, v in values.items() if v is not None}
        self.tracker.log(named, step=record.step)
        self.shown.record(record)

    def finish(self, figures: Mapping[str, float]) -> None:
        """Track the run's last figures, and end."""
        self.tracker.log({f"run/{name}": value for name, value in figures.items()}, step=0)
        self.tracker.finish()
