"""A run is a folder: every stage reads it and adds to it."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atp_edge.config import Config
from atp_edge.run.files import (
    drop_from_json,
    file_lock,
    read_json,
    settle,
    update_json,
    write_atomically,
)
from atp_edge.run.pinned import (
    check_names,
    check_settings,
    pin_sources,
    pinned_settings,
    read_inputs,
    settings_of,
)
from atp_edge.run.records import (
    FOLDERS,
    MEMORY,
    METRICS,
    PARTS,
    PLAN,
    REPORT,
    STAGES,
    WORK,
    WRITER,
    Records,
    StageName,
)
from atp_edge.settings import read_config, read_versions, to_toml

VERSIONS_OF = ("atp-edge", "torch", "transformers", "peft", "accelerate", "datasets", "onnx")
_OF_THE_VERY_FILES = ("verify", "gate")
"""What says of files that they are good, and without a record says nothing."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    config_toml = property(lambda self: self.path / "config.toml")
    inputs_json = property(lambda self: self.path / "inputs.json")
    plan = property(lambda self: self.path / PLAN)
    metrics_json = property(lambda self: self.path / METRICS)
    memory_json = property(lambda self: self.path / MEMORY)
    checkpoint = property(lambda self: self.path / "checkpoint")
    dense = property(lambda self: self.path / "dense")
    slim = property(lambda self: self.path / "slim")
    adapter = property(lambda self: self.path / "adapter")
    onnx = property(lambda self: self.path / "onnx")
    onnx_dense = property(lambda self: self.path / "onnx-dense")

    @property
    def records(self) -> Records:
        """What every finished stage read and wrote."""
        return Records(self.path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone, with what a kill left of its folders put right.

        Raises TakenError where another process works on it.
        """
        with file_lock(self.path):
            for name in FOLDERS:
                settle(self.path / name)
            yield

    def require(self, *forms: str) -> None:
        """Raise ValueError unless these forms of the model (`dense`, `slim`, `onnx`) are there, as
        their stages wrote them."""
        for form in forms:
            folder, again = self.path / form, self.command(WRITER[form])
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder} is not there; write it with {again}")
            if trouble := self.records.trouble_with(form):
                raise ValueError(
                    f"{folder} is not what {WRITER[form]} wrote: {trouble}; write it again with "
                    f"{again}"
                )

    def require_profile(self) -> None:
        """Raise ValueError where domain.npz is there, and is not what the gate wrote."""
        path, gated = "domain.npz", self.records.get("gate")
        if gated and (self.path / path).exists() and (trouble := self.records.trouble_with(path)):
            raise ValueError(
                f"{self.path}: {trouble} since the gate; put it back, or write it again with "
                f"{self.command('gate')}"
            )

    def require_read(self, name: StageName) -> None:
        """Raise ValueError unless all that a stage reads is there, as the stages before it left
        it."""
        before = [stage for stage in STAGES if any(WRITER[p] == stage for p in WORK[name].reads)]
        for stage in reversed(before):
            if self.records.get(stage) is None:
                raise ValueError(
                    f"{self.path}: {name} reads what {stage} leaves, and {stage} has not ended; "
                    f"run {self.command(stage)}"
                )
        for path in WORK[name].reads:
            if trouble := self.records.trouble_with(path):
                raise ValueError(
                    f"{self.path}: {name} reads what {WRITER[path]} left, and {trouble}; put it "
                    f"back, or write it again with {self.command(WRITER[path])}"
                )

    def check_places(self, names: Iterable[StageName]) -> None:
        """Raise ValueError where a folder stands in the place of a file that these stages write."""
        written = [path for name in names if name in WORK for path in WORK[name].writes]
        for path in (METRICS, REPORT, *(path for path in written if Path(path).suffix)):
            if (self.path / path).is_dir():
                raise ValueError(
                    f"{self.path / path} is a folder, and a file is written there; move it away"
                )

    def command(self, name: StageName | Literal["run"], *more: str) -> str:
        """What a user types for this stage of the run, or for all of it."""
        by_config = name in ("run", "train") and self.config_toml.is_file()
        settings = ("--config", self.config_toml) if by_config else ("--out", self.path)
        return f"`{shlex.join(['atp-edge', name, *map(str, settings), *more])}`"

    def metrics(self) -> dict[str, Any]:
        return read_json(self.metrics_json)

    def add_metrics(self, stage: str, values: dict[str, Any]) -> None:
        update_json(self.metrics_json, stage, values)

    def stale(self) -> dict[str, str]:
        """Stages and benches whose figures are of other files than there are now, and why."""
        troubles = {name: self.records.stale(name) for name in self.records.measured}
        for name in self.metrics().keys() & set(_OF_THE_VERY_FILES) - troubles.keys():
            troubles[name] = f"no record in {self.records.file} says of which files"
        return {name: trouble for name, trouble in troubles.items() if trouble}

    def void_damaged(self, say: Callable[[str], None]) -> None:
        """Forget what metrics.json does not say as it was measured, and say so."""
        records = self.records
        damaged = [n for n in records.measured if not records.has_its_figures(n)]
        if damaged:
            say(f"{self.metrics_json} was changed: without {', '.join(damaged)}")
            self.void(*damaged)

    def void(self, *stages: str) -> None:
        """Forget what these stages found: their figures and their records, and the gate's files,
        which say a verdict to whoever reads them alone."""
        if "gate" in stages:
            for name in WORK["gate"].writes:
                (self.path / name).unlink(missing_ok=True)
        self.records.drop(stages)
        drop_from_json(self.metrics_json, stages)

    def parts(self) -> dict[str, Any]:
        """Figures of the finished parts of training, by the part's name."""
        return read_json(self.path / PARTS)

    def add_part(
        self, name: str, figures: dict[str, Any], read: Mapping[str, str] | None = None
    ) -> None:
        """The figures of a part, and its record. read: SHA-256 of its inputs when it began."""
        update_json(self.path / PARTS, name, figures)
        if name in WORK:
            self.records.keep(name, read=self.records.reads(name) if read is None else read)

    def config(self) -> Config:
        """The run's configuration. Raises ValueError when the folder holds no run."""
        if not self.config_toml.is_file():
            raise ValueError(
                f"{self.path} holds no run (no config.toml); start one with "
                f"{self.command('run')} or name another folder with --out"
            )
        return read_config(self.config_toml)

    def adopt(self, config: Config, say: Callable[[str], None]) -> None:
        """Take what a run from before records were kept has as it is, once, and say so.

        What was proven or judged is not taken, for nothing says of which files: it is made again.
        """
        if self.records.file.exists():
            return
        figures = {METRICS: self.metrics(), PARTS: self.parts()}
        there = [name for name, work in WORK.items() if name in figures[work.figures]]
        done = [name for name in there if name not in _OF_THE_VERY_FILES]
        if done:
            self.records.adopt({name: settings_of(config, name) for name in done})
            say(f"done before records were kept, and taken as they are: {', '.join(done)}")
        self.void(*_OF_THE_VERY_FILES)
        if again := [name for name in _OF_THE_VERY_FILES if name in there]:
            say(f"no record says of which files, so it is to be done again: {', '.join(again)}")


def open_run(
    config: Config,
    inputs: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> RunFolder:
    """The folder of a run, new or to be gone on with; config.toml then holds these settings.

    inputs: what the run begins with (see atp_edge.run.pinned); without, model and data are compared
    by name alone. Raises ValueError when the folder holds a run that began with something else.
    """
    run = RunFolder(Path(config.out))
    before = run.config() if run.config_toml.exists() else None
    if before is None:
        _check_without_config(run)
    known = read_inputs(run.path)
    if known:
        check_settings(run.path, known["settings"], config, before)
    elif before:
        check_settings(run.path, pinned_settings(before), config, None)
        check_names(run.path, before, config)
    if before:
        run.adopt(before, say)
    if inputs:
        pin_sources(run.path, inputs, say)
    if before != config:
        now = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
        versions = read_versions(run.config_toml) if before else now
        write_atomically(run.config_toml, to_toml(config, versions))
    return run


def _check_without_config(run: RunFolder) -> None:
    """Remove what a kill left of a run as it was begun. Raises ValueError for one whose config.toml
    is gone, and its settings with it."""
    recorded = run.records.inputs is not None
    begun = run.checkpoint.exists() or run.metrics_json.exists()
    if begun and not recorded:
        raise ValueError(
            f"{run.config_toml} is gone, and there is more of its run; put it back, or name a new "
            "folder with --out"
        )
    if recorded and not begun:
        run.inputs_json.unlink(missing_ok=True)
        run.records.file.unlink()
