"""A phase of training: steps, checkpoints, and the way back when it goes wrong.

A learner makes one step; `run_phase` drives it, keeps its history and its checkpoints, and goes on
where a killed run was.
"""

from __future__ import annotations

import math
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from atp_edge.run import ranks
from atp_edge.run.errors import Stopped
from atp_edge.run.files import file_atomically
from atp_edge.run.history import PHASE_NAMES, Phase, Record, diverges, read_history, write_history
from atp_edge.run.stopping import heard_later

MOST_RETURNS = 3


class Learner(Protocol):
    """What `run_phase` drives: steps `first_step` to `last_step` of a phase.

    `rate` scales every learning rate. `validate` gives the loss on text that is not trained on, or
    None where a phase has no such measure.
    """

    phase: Phase
    first_step: int
    last_step: int
    rate: float

    def step(self, index: int) -> Record: ...
    def validate(self) -> float | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """Where a phase stands, beside its learner's state."""

    step: int
    rate: float = 1.0
    best_loss: float = math.inf
    """Lowest validation loss so far."""
    best_step: int = 0
    worse: int = 0
    """Validations since the best one."""
    returns: tuple[str, ...] = ()
    """Why the phase went back to a checkpoint, each time."""


def run_phase(
    learner: Learner,
    *,
    folder: Path,
    save_every: int,
    on_record: Callable[[Record], None],
    say: Callable[[str], None] = lambda text: None,
    patience: float = 0.0,
) -> PhaseState:
    """Drive a learner through its phase, from the last checkpoint of the phase if there is one.

    folder: the run's; checkpoint/ and history.jsonl are written every `save_every` steps. A phase
    that diverges goes back to its last checkpoint at half the learning rate. patience: the share of
    the phase that may pass without a better validation (one a checkpoint) before it stops at its
    best step; 0: never. A share, for a rate that falls over the phase brings much of its gain late.
    SIGINT and SIGTERM are heard at the end of a step, which is then saved.
    Raises FloatingPointError when a phase diverges more than `MOST_RETURNS` times.
    """
    checkpoints = _Checkpoints(folder / "checkpoint", learner)
    state = checkpoints.load() or checkpoints.save(PhaseState(step=learner.first_step))
    learner.rate = state.rate
    may_be_worse = math.ceil(patience * (learner.last_step - learner.first_step) / save_every)
    past = [r for r in read_history(folder) if r.phase != learner.phase]
    ours = [r for r in read_history(folder) if r.phase == learner.phase and r.step < state.step]
    stop = False
    with heard_later(say) as stopped:
        while state.step < learner.last_step and not 0 < may_be_worse <= state.worse and not stop:
            began = time.perf_counter()
            record, trouble = _step(learner, state.step)
            if record is not None:
                ours.append(replace(record, seconds=time.perf_counter() - began))
                trouble = diverges(ours)
            if record is None or trouble is not None:
                state = _go_back(checkpoints, state, f"step {state.step}: {trouble}")
                learner.rate = state.rate
                ours = [r for r in ours if r.step < state.step]
                where = f"back to step {state.step} at rate x{state.rate:g}"
                say(f"{learner.phase}, {trouble}; {where}")
                continue
            state, stop = replace(state, step=record.step + 1), any(ranks.of_all(stopped()))
            due = (state.step - learner.first_step) % save_every == 0
            if due or state.step == learner.last_step:
                ours[-1], state = _validated(learner, ours[-1], state, checkpoints, patience)
            if due or state.step == learner.last_step or stop:
                checkpoints.save(state)
                if ranks.is_main():
                    write_history(folder, (*past, *ours))
            on_record(ours[-1])
        if stop and not stopped():  # Another rank was told to.
            raise Stopped(signal.SIGTERM)
    if state.worse:
        checkpoints.load_best()
        say(f"{learner.phase}: taking step {state.best_step}, the best on the decision split")
    return state


def _validated(
    learner: Learner,
    record: Record,
    state: PhaseState,
    checkpoints: _Checkpoints,
    patience: float,
) -> tuple[Record, PhaseState]:
    """The step's record with its validation loss, and the phase judged by it; where it has one."""
    loss = learner.validate() if patience else None
    if loss is None:
        return record, state
    return replace(record, validation_loss=loss), checkpoints.judge(state, loss)


def _step(learner: Learner, index: int) -> tuple[Record | None, str | None]:
    """A step's record, or why it could not be made.

    Raises FloatingPointError where the learning rates cannot be the cause: before any update.
    """
    try:
        record = learner.step(index)
    except FloatingPointError as error:
        return None, str(error)
    if index == learner.first_step and not math.isfinite(record.loss):
        raise FloatingPointError(
            f"the loss is {record.loss} before the first update of the {learner.phase} phase: the "
            "model's own outputs are not finite on this text, whatever the learning rates. Try "
            "--train-precision no in a new --out; if it stays, the weights or the text are at fault"
        )
    return record, None


def _go_back(checkpoints: _Checkpoints, state: PhaseState, trouble: str) -> PhaseState:
    """The last checkpoint at half the rate; FloatingPointError when that was tried often enough."""
    if len(state.returns) >= MOST_RETURNS:
        raise FloatingPointError(
            f"training diverges ({trouble}) at {state.rate:g} of its learning rates; "
            "take smaller ones (--lora-lr, --recovery-retrain-lr, --decision-lr) in a new --out"
        )
    last = checkpoints.load()
    assert last is not None
    return checkpoints.save(replace(last, rate=state.rate / 2, returns=(*state.returns, trouble)))


def phase_begun(folder: Path) -> Phase | None:
    """The phase that a run's last checkpoint is of, if it has one."""
    saved = _read_last(folder / "checkpoint", mmap=True)
    return saved["phase"] if saved else None


def saved_step(folder: Path) -> str | None:
    """What a run's last checkpoint holds, in words, if it can be read."""
    try:
        saved = _read_last(folder / "checkpoint", mmap=True)
    except ValueError:
        return None
    return f"{PHASE_NAMES[saved['phase']]} up to step {saved['state']['step']}" if saved else None


def drop_damaged(folder: Path, say: Callable[[str], None]) -> None:
    """Remove checkpoints of a run that are not what was saved, so that the phase begins anew."""
    checkpoints = folder / "checkpoint"
    try:
        saved = _read_last(checkpoints, mmap=True)
        if saved and math.isfinite(saved["state"]["best_loss"]):
            _read_checked(checkpoints / "best.pt", mmap=True)
    except (ValueError, FileNotFoundError) as error:
        say(str(error))
        for name in ("state.pt", "best.pt"):
            (checkpoints / name).unlink(missing_ok=True)


def _read_last(folder: Path, *, mmap: bool = False) -> Any:
    """What state.pt holds, or None. mmap: tensors are read as they are touched.

    Raises ValueError when it is damaged.
    """
    path = folder / "state.pt"
    if not path.exists():
        return None
    saved = _read_checked(path, mmap=mmap)
    if not isinstance(saved, dict) or saved.keys() != {"phase", "state", "learner"}:
        raise ValueError(f"{path} is no checkpoint; without it the phase begins anew")
    return saved


def _read_checked(path: Path, *, mmap: bool = False) -> Any:
    """What a checkpoint holds. Raises ValueError when its bytes have not the checksums that its
    archive gives them: torch does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is not what was saved")
        return torch.load(path, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is gone; without it the phase begins anew") from None
    except Exception as error:  # Damaged bytes are read as anything, and raise as much.
        raise ValueError(
            f"{path} is damaged ({error}); without it the phase begins anew"
        ) from error


class _Checkpoints:
    """state.pt: the last checkpoint of the phase; best.pt: its best parameters.

    Rank 0 writes, all read: nobody writes while another may still read.
    """

    def __init__(self, folder: Path, learner: Learner) -> None:
        self.folder, self.learner = folder, learner

    def save(self, state: PhaseState) -> PhaseState:
        content = {"phase": self.learner.phase, "state": asdict(state)}
        if ranks.is_main():
            _save(self.folder / "state.pt", content | {"learner": self.learner.state_dict()})
        return state

    def load(self) -> PhaseState | None:
        """Put the learner where it was, if the last checkpoint is of its phase."""
        ranks.wait()
        saved = _read_last(self.folder)
        ranks.wait()
        if saved is None or saved["phase"] != self.learner.phase:
            return None
        self.learner.load_state_dict(saved["learner"])
        return PhaseState(**saved["state"])

    def judge(self, state: PhaseState, loss: float) -> PhaseState:
        """Count a validation; the best one so far is kept."""
        if loss >= state.best_loss:
            return replace(state, worse=state.worse + 1)
        if ranks.is_main():
            _save(self.folder / "best.pt", self.learner.state_dict()["parameters"])
        return replace(state, best_loss=loss, best_step=state.step, worse=0)

    def load_best(self) -> None:
        ranks.wait()
        best = _read_checked(self.folder / "best.pt")
        ranks.wait()
        self.learner.load_state_dict(self.learner.state_dict() | {"parameters": best})


def _save(path: Path, content: dict[str, Any]) -> None:
    # To an open file: to a path, torch's error does not say why a write failed.
    with file_atomically(path) as beside, beside.open("wb") as file:
        torch.save(content, file)
