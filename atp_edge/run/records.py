"""What every stage reads and writes, and the record of it: stages.json.

A stage is done as long as all that it read and wrote is, byte for byte, what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from atp_edge.run.files import read_json, write_json
from atp_edge.run.hashes import difference, files_sha256, value_sha256

StageName = Literal["train", "shrink", "export", "verify", "bench", "gate", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which `atp-edge run` runs them."""
METRICS, PARTS, REPORT = "metrics.json", "checkpoint/parts.json", "report.html"
HISTORY, PLAN, MEMORY = "history.jsonl", "plan.json", "memory.json"
DENSE_ADAPTER = "checkpoint/dense_adapter.safetensors"
FROZEN, TUNED = "checkpoint/frozen.safetensors", "checkpoint/tuned.safetensors"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage, a part of training or a bench has to do with, by path in the run's folder."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """Settings and sections that it reads and training does not."""
    source: bool = False
    """Whether it reads the model and the text that the run began with."""
    figures: str = METRICS


WORK: dict[str, Work] = {
    "tune_dense": Work(writes=("dense", DENSE_ADAPTER), source=True, figures=PARTS),
    "learn_decision": Work(
        reads=("dense", DENSE_ADAPTER), writes=(PLAN, FROZEN), source=True, figures=PARTS
    ),
    "recover": Work(reads=("dense", PLAN, FROZEN), writes=(TUNED,), source=True, figures=PARTS),
    "train": Work(writes=("dense", PLAN, TUNED, "adapter", HISTORY), source=True),
    "shrink": Work(
        reads=("dense", PLAN, TUNED),
        writes=("slim",),
        settings=("export.keep_adapter",),
        source=True,
    ),
    "export": Work(
        reads=("dense", "slim"), writes=("onnx", "onnx-dense"), settings=("export",), source=True
    ),
    "verify": Work(reads=("slim", "onnx"), settings=("export.precision",), source=True),
    "bench": Work(reads=("onnx-dense", "onnx"), settings=("bench",)),
    "gate": Work(
        reads=("dense", "slim", "onnx"), writes=("gate.json", "gate.xml", "domain.npz"), source=True
    ),
    "rounding": Work(reads=("slim",), source=True),
    "peers": Work(reads=("dense", "slim")),
}
WRITER: dict[str, StageName] = {path: s for s in STAGES if s in WORK for path in WORK[s].writes}
"""The stage that writes a file or folder of the run."""
FOLDERS = ("dense", "slim", "adapter", "onnx", "onnx-dense")
EXPORTED_FIGURES = "figures.json"
"""In a folder of `export --to`: what was proven and measured of it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished stage read and wrote: SHA-256 by file, and of its figures."""

    read: dict[str, str]
    wrote: dict[str, str]
    figures: str
    settings: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None
    """Why what it should have proven is not so."""


@dataclass(frozen=True)
class Records:
    """stages.json of a run's folder. Raises ValueError when the file is damaged."""

    folder: Path

    file = property(lambda self: self.folder / "stages.json")

    def _content(self) -> dict[str, Any]:
        content = read_json(self.file)
        seal = content.pop("sha256", None)
        if content and seal != value_sha256(content):
            raise ValueError(
                f"{self.file} is damaged: it is not what was written there; put it back, or delete "
                "it, and the run's files are taken as they are, and proven and judged anew"
            )
        return {"inputs": None, "done": {}} | content

    def _write(self, content: dict[str, Any]) -> None:
        write_json(self.file, content | {"sha256": value_sha256(content)})

    def begin(self, inputs: str) -> None:
        """Note the SHA-256 of what the run begins with."""
        self._write(self._content() | {"inputs": inputs})

    @property
    def inputs(self) -> str | None:
        """SHA-256 of what the run began with, if it was recorded."""
        noted: str | None = self._content()["inputs"]
        return noted

    @property
    def names(self) -> frozenset[str]:
        """Of all that is recorded."""
        return frozenset(self._content()["done"])

    @property
    def measured(self) -> list[str]:
        """The recorded stages and benches, in their order: all but the parts of training."""
        names = self.names
        return [n for n, work in WORK.items() if work.figures == METRICS and n in names]

    def get(self, name: str) -> Record | None:
        done = self._content()["done"]
        return Record(**done[name]) if name in done else None

    def keep(
        self,
        name: str,
        *,
        read: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        failed: str | None = None,
    ) -> None:
        """Record a stage whose files and figures are there. read: of its inputs, when it began."""
        self._add({name: replace(self._now(name, settings or {}), read=dict(read), failed=failed)})

    def adopt(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Record these stages, done with these settings, as they are now."""
        self._add({name: self._now(name, values) for name, values in settings.items()})

    def _now(self, name: str, settings: Mapping[str, Any]) -> Record:
        return Record(
            read=self.reads(name),
            wrote=files_sha256(self.folder, WORK[name].writes),
            figures=self._figures(name),
            settings=dict(settings),
        )

    def _add(self, records: Mapping[str, Record]) -> None:
        content = self._content()
        added = {name: asdict(record) for name, record in records.items()}
        self._write(content | {"done": content["done"] | added})

    def drop(self, names: Iterable[str]) -> None:
        """Forget these stages, if they are recorded."""
        content = self._content()
        left = {k: v for k, v in content["done"].items() if k not in set(names)}
        if left != content["done"]:
            self._write(content | {"done": left})

    def reads(self, name: str) -> dict[str, str]:
        """SHA-256 of what a stage reads, as it is now."""
        return files_sha256(self.folder, WORK[name].reads)

    def _figures(self, name: str) -> str:
        return value_sha256(read_json(self.folder / WORK[name].figures).get(name))

    def stale(self, name: str) -> str | None:
        """What of a recorded stage is not what it was; None: nothing."""
        record = self.get(name)
        assert record is not None
        if changed := difference(record.read, self.reads(name)):
            return changed
        # The history cannot be made again, and no later stage computes with it.
        made = [path for path in WORK[name].writes if path != HISTORY]
        wrote = {k: v for k, v in record.wrote.items() if k != HISTORY}
        if changed := difference(wrote, files_sha256(self.folder, made)):
            return changed
        if not self.has_its_figures(name):
            return f"{WORK[name].figures}: the figures of {name} changed"
        return None

    def has_its_figures(self, name: str) -> bool:
        """Whether the figures of a recorded stage are those that it left."""
        record = self.get(name)
        return record is not None and record.figures == self._figures(name)

    def trouble(self, name: str, settings: Mapping[str, Any] | None = None) -> str | None:
        """Why a stage has to be done (again); None: it is done. settings: those to be done with."""
        record = self.get(name)
        if record is None:
            return "it has not ended"
        if record.failed:
            return f"it failed ({record.failed})"
        for key, value in (settings or {}).items():
            if record.settings.get(key) != value:
                return f"{key} = {record.settings.get(key)} then, {value} now"
        return self.stale(name)

    def trouble_with(self, path: str) -> str | None:
        """What is wrong with a file or folder that a stage wrote; None: it is what was written."""
        record = self.get(WRITER[path])
        if record is None:
            begun = f"{WRITER[path]} has not ended, or what it reads was made anew since"
            return begun if self.file.exists() else None
        return difference(_under([path], record.wrote), files_sha256(self.folder, [path]))

    def outdated_by(self, name: str) -> dict[str, str]:
        """What read other work of a stage than there is now, or builds on what did; and why."""
        found: dict[str, str] = {}
        for other in self.measured:
            reads = set(WORK[other].reads)
            shared = sorted(reads.intersection(WORK[name].writes))
            record = self.get(other)
            then = _under(shared, record.read if record else {})
            before = next((f for f in found if reads.intersection(WORK[f].writes)), None)
            if changed := difference(then, files_sha256(self.folder, shared)):
                found[other] = changed
            elif before:
                found[other] = f"{before} does not"
        return found


def _under(paths: Collection[str], files: Mapping[str, str]) -> dict[str, str]:
    """The files that these paths are or hold."""
    return {
        k: v for k, v in files.items() if k in paths or k.startswith(tuple(f"{p}/" for p in paths))
    }
