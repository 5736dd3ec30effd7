"""A run is a folder: every stage reads it and adds to it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from atp_edge.config import Config, read_config, to_toml
from atp_edge.run.files import read_json, update_json, write_atomically

StageName = Literal["train", "shrink", "export", "verify", "bench", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which `atp-edge run` runs them."""
AFTER: dict[StageName, StageName] = {
    "shrink": "train",
    "export": "shrink",
    "verify": "export",
    "bench": "export",
}
"""The stage whose work another reads, by that other."""
WRITTEN_BY: dict[str, StageName] = {"dense": "train", "slim": "shrink", "onnx": "export"}
"""The stage that writes a form of the model, by the form's folder."""
VERSIONS_OF = ("atp-edge", "torch", "transformers", "peft", "accelerate", "datasets", "onnx")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    config_toml = property(lambda self: self.path / "config.toml")
    plan = property(lambda self: self.path / "plan.json")
    metrics_json = property(lambda self: self.path / "metrics.json")
    checkpoint = property(lambda self: self.path / "checkpoint")
    dense = property(lambda self: self.path / "dense")
    slim = property(lambda self: self.path / "slim")
    adapter = property(lambda self: self.path / "adapter")
    onnx = property(lambda self: self.path / "onnx")
    onnx_dense = property(lambda self: self.path / "onnx-dense")

    def require(self, *forms: str) -> None:
        """Raise ValueError unless these forms of the model (`dense`, `slim`, `onnx`) are there."""
        for form in forms:
            folder = self.path / form
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"{folder} is not there; write it with {self.command(WRITTEN_BY[form])}"
                )

    def command(self, stage: StageName) -> str:
        """What a user runs for this stage of the run."""
        settings = f"--config {self.config_toml}" if stage == "train" else f"--out {self.path}"
        return f"`atp-edge {stage} {settings}`"

    def metrics(self) -> dict[str, Any]:
        return read_json(self.metrics_json)

    def add_metrics(self, stage: str, values: dict[str, Any]) -> None:
        update_json(self.metrics_json, stage, values)

    def parts(self) -> dict[str, Any]:
        """Figures of the finished parts of training, by the part's name."""
        return read_json(self.checkpoint / "parts.json")

    def add_part(self, name: str, figures: dict[str, Any]) -> None:
        update_json(self.checkpoint / "parts.json", name, figures)

    def config(self) -> Config:
        """The run's configuration. Raises ValueError when the folder holds no run."""
        if not self.config_toml.is_file():
            raise ValueError(
                f"{self.path} holds no run (no config.toml); start one with "
                f"`atp-edge run --out {self.path}` or name another folder with --out"
            )
        return read_config(self.config_toml)


def open_run(config: Config) -> RunFolder:
    """The folder of a run, new or to be gone on with.

    Raises ValueError when the folder holds a run of another configuration.
    """
    run = RunFolder(Path(config.out))
    if run.config_toml.exists():
        before = run.config()
        if before != config:
            raise ValueError(
                f"{run.path} holds a run of another configuration ({_difference(before, config)}); "
                "name a new folder with --out, or repeat the old settings to go on with it"
            )
        return run
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    write_atomically(run.config_toml, to_toml(config, versions))
    return run


def _difference(before: Config, after: Config) -> str:
    old, new = to_toml(before).splitlines(), to_toml(after).splitlines()
    changed = [f"{a} there, {b} here" for a, b in zip(old, new, strict=True) if a != b]
    return "; ".join(changed[:3])
