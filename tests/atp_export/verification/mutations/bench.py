"""Faults x flavours x precisions: which check catches each, and what a harmless one changes.

A fault is harmless only if the fp32 form's logits stay within HARMLESS of the unharmed one's, over
their spread, wherever `verify` looks: that is measured, and no fault is listed as such.

Called with a model, a flavour, a precision, where to begin, whether all, and what to leave out, it
prints an outcome a line: `outcomes` reads them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from atp_export.export import export_onnx
from atp_export.runtime import Session
from atp_export.verification.embedding import with_table
from atp_export.verification.faint import faint_factors, make_faint
from atp_export.verification.observe import CPU, Rows, as_others_run_it, asked_of, observe
from atp_export.verification.places import places_of
from atp_export.verification.proof import UNREADABLE
from atp_export.verification.verify import verify
from atp_export.verification.widen import widen
from transformers import PreTrainedModel

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import said_shape
from tests.atp_export.test_onnx import Numbers
from tests.atp_export.verification.mutations.of_graphs import Change, graph_mutations
from tests.atp_export.verification.mutations.of_models import (
    IN_THE_FILE,
    IN_THE_MODEL,
    ModelFault,
    changed,
)
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[4]
HARMLESS = 1e-6
CONTEXT = 40
PROMPT = "1 2 3 4 5 6 7"
NEW_TOKENS = 4
FLAVOURS = ("ort", "standard", "portable")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "int4 gptq")
MODEL = "a model"
SMALL = {"one value", "x 1.01"}
MOVED_BY_GPTQ = {"levels of a matrix", "scales of a matrix", "embedding, head"}
"""Faults of single levels and scales: gptq itself moves weights by as much."""
CALIBRATION = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(0))


def _windowed() -> PreTrainedModel:
    """Tied, with biases, head norms, a scaled RoPE, and a window in its last layer alone."""
    return tiny_model(
        "qwen3",
        tied=True,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": CONTEXT // 2,
        },
    )


def _biased() -> PreTrainedModel:
    """Not tied, with biases in every projection and widths that no block divides."""
    sizes = {"hidden_size": 84, "intermediate_size": 37, "max_position_embeddings": CONTEXT}
    return tiny_model("llama-biases", num_hidden_layers=2, **sizes)


MODELS = {"windowed": _windowed, "biased": _biased}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `verify` said of one fault.

    change: the largest difference of the fp32 form's logits over their spread, faint or not; inf
    where it cannot be run, where a logit is not a number, and where it is not measured because the
    file's own tensors show the fault. shipped_change: that of what ships, where `change` is small.
    caught_by: names of the checks that failed.
    """

    of: str
    where: str
    kind: str
    change: float
    shipped_change: float
    caught_by: tuple[str, ...]

    @property
    def missed(self) -> bool:
        return not self.caught_by and not self.change <= HARMLESS

    @property
    def false_alarm(self) -> bool:
        """Whether logits that did not change were called wrong. Tensors that are not the model's
        are called so by right."""
        of_logits = [name for name in self.caught_by if name not in OF_THE_FILE]
        return bool(of_logits) and max(self.change, self.shipped_change) <= HARMLESS


OF_THE_FILE = {"finite", "places", "weights", "rounding", "rotary", "token ids"}
Answers = list[list[Rows]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    of: str
    where: str
    kind: str
    make: Callable[[], PreTrainedModel]


class Export:
    """One model in one flavour and precision, unharmed, and what its fp32 form answers."""

    def __init__(self, folder: Path, model: PreTrainedModel, flavour: Any, precision: str) -> None:
        self.folder, self.model, self.flavour = folder, model, flavour
        self.precision, _, quantizer = precision.partition(" ")
        self.quantizer: Any = quantizer or "nearest"
        self._write()
        self.graph = onnx.load(folder / "onnx" / "model.onnx")
        self._asked = asked_of([int(token) for token in PROMPT.split()], CONTEXT)
        self._fp32, self._shipped = self._in_fp32(), self._as_shipped()

    def faults(self) -> Iterator[Fault]:
        """What makes each fault: it returns the model to be judged by."""
        yield Fault(of="nothing", where="the export", kind="unharmed", make=lambda: self.model)
        for kind, fault in IN_THE_FILE.items():
            yield Fault(of=MODEL, where="the file", kind=kind, make=partial(self._write, fault))
        for kind, fault in IN_THE_MODEL.items():
            make = partial(self._take_for, fault)
            yield Fault(of=MODEL, where="the model", kind=kind, make=make)
        for m in graph_mutations(self.graph.graph):
            moved = self.quantizer == "gptq" and m.of in MOVED_BY_GPTQ
            if not (moved and m.kind in SMALL):
                make = partial(self._save, m.change)
                yield Fault(of=m.of, where=m.where, kind=m.kind, make=make)

    def outcome(self, fault: Fault) -> Outcome:
        """What `verify` says of one fault."""
        # Damaged graphs end in errors that are expected; ONNX Runtime prints each.
        ort.set_default_logger_severity(4)
        try:
            judge = fault.make()
        except ValueError as error:  # gptq reads what a model computes before anything is written.
            return _refused(fault, error)
        report = verify(
            self.folder / "onnx",
            judge,
            Numbers(),
            [PROMPT],
            new_tokens=NEW_TOKENS,
            precision=self.precision,
            provider=CPU,
        )
        failed = (check.name.split(", ")[0] for check in report.checks if not check.passed)
        caught_by = tuple(dict.fromkeys(failed))
        assert report.passed == (not caught_by)
        # What the file's own tensors show needs no other measure, nor does another model.
        clear = judge is not self.model or not OF_THE_FILE.isdisjoint(caught_by)
        change = np.inf if clear else _change(self._in_fp32, self._fp32)
        decided = clear or change > HARMLESS
        return Outcome(
            of=fault.of,
            where=fault.where,
            kind=fault.kind,
            change=change,
            shipped_change=np.inf if decided else _change(self._as_shipped, self._shipped),
            caught_by=caught_by,
        )

    def _take_for(self, fault: ModelFault) -> PreTrainedModel:
        self._write()
        return changed(self.model, fault)

    def _write(self, fault: ModelFault | None = None) -> PreTrainedModel:
        model = changed(self.model, fault) if fault else self.model
        save_narrow(model, None, self.folder / "slim")
        export_onnx(
            self.folder / "slim",
            self.folder / "onnx",
            flavour=self.flavour,
            precision=self.precision,
            quantizer=self.quantizer,
            calibration=CALIBRATION if self.quantizer == "gptq" else None,
        )
        return self.model

    def _save(self, change: Change) -> PreTrainedModel:
        model = onnx.ModelProto()
        model.CopyFrom(self.graph)
        change(model.graph)
        path = self.folder / "onnx" / "model.onnx"
        for file in path.parent.glob("model.onnx*"):
            file.unlink()
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=1024,
            convert_attribute=False,
        )
        return self.model

    def _in_fp32(self) -> Answers:
        wide = self.folder / "wide"
        shutil.rmtree(wide, ignore_errors=True)
        wide.mkdir()
        widened = with_table(widen(self.folder / "onnx", wide), self.model.config.vocab_size)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        answers = [
            list(observe(Session(wide, provider=CPU), self._asked)),
            [as_others_run_it(wide, self._asked)],
        ]
        places = places_of(widened, own)
        make_faint(widened, places, faint_factors(own, places, said_shape(self.model.config)))
        return [*answers, list(observe(Session(wide, provider=CPU), self._asked))]

    def _as_shipped(self) -> Answers:
        return [list(observe(Session(self.folder / "onnx", provider=CPU), self._asked))]


def _refused(fault: Fault, error: ValueError) -> Outcome:
    assert "finite" in str(error), error
    return Outcome(
        of=fault.of,
        where=fault.where,
        kind=fault.kind,
        change=np.inf,
        shipped_change=np.inf,
        caught_by=("refused",),
    )


def _change(answers: Callable[[], Answers], unharmed: Answers) -> float:
    """The largest difference of logits over the spread of those they belong to."""
    try:
        damaged = answers()
    except UNREADABLE:
        return np.inf
    worst = 0.0
    for ours, theirs in zip(damaged, unharmed, strict=True):
        spread = float(np.concatenate([rows.logits for rows in theirs]).std())
        for a, b in zip(ours, theirs, strict=True):
            if a.logits.shape != b.logits.shape:
                return np.inf
            off = float(np.abs(a.logits - b.logits).max()) / spread
            worst = max(worst, off if np.isfinite(off) else np.inf)
    return worst


Kind = tuple[str, str]
"""What a fault is of, and its kind."""


def outcomes(
    model: str, flavour: str, precision: str, *, every: bool, without: Collection[Kind] = ()
) -> Iterator[Outcome]:
    """Of every fault, or of the first one of each kind that is not left out.

    In another process: a fault that makes ONNX Runtime abort ends that one, and counts as caught.
    """
    begin = 0
    while True:
        which = ["every" if every else "first", json.dumps(sorted(without))]
        arguments = [model, flavour, precision, str(begin), *which]
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        started: dict[str, Any] = {}
        for line in filter(lambda line: line.startswith("{"), process.stdout):
            said = json.loads(line)
            if "begins" in said:
                begin, started = said["begins"] + 1, said["fault"]
            else:
                yield Outcome(**said | {"caught_by": tuple(said["caught_by"])})
        if process.wait() == 0:
            return
        if process.returncode > 0:
            raise RuntimeError(f"{arguments} ended with {process.returncode} at {started}")
        yield Outcome(**started, change=np.inf, shipped_change=np.inf, caught_by=("crash",))


def _say(
    model: str, flavour: str, precision: str, begin: int, every: bool, without: Collection[Kind]
) -> None:
    """Print what begins and what came of it, from a fault on."""
    torch.set_num_threads(1)
    seen = set(without)
    with tempfile.TemporaryDirectory() as folder:
        export = Export(Path(folder), MODELS[model](), flavour, precision)
        for i, fault in enumerate(export.faults()):
            wanted = every or (fault.of, fault.kind) not in seen
            seen.add((fault.of, fault.kind))
            if wanted and i >= begin:
                about = {"of": fault.of, "where": fault.where, "kind": fault.kind}
                for said in ({"begins": i, "fault": about}, None):
                    line = json.dumps(said or asdict(export.outcome(fault)))
                    sys.stdout.write(f"{line}\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    left_out = {(of, kind) for of, kind in json.loads(sys.argv[6])}
    _say(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5] == "every", left_out)
