"""Phases: divergence, the way back, patience."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from atp_edge.data.blocks import Blocks
from atp_edge.run.errors import Stopped
from atp_edge.run.history import Record, diverges, read_history
from atp_edge.training.learners import Tuner
from atp_edge.training.loop import drop_damaged, run_phase, saved_step
from tests.atp_edge.training.test_learners import CONFIG, learner
from tests.tiny import BLOCKS, TRAIN_IDS, lora_model


def test_a_loss_that_is_not_finite_from_the_start_is_not_blamed_on_the_rates(
    tmp_path: Path,
) -> None:
    made = learner()
    with torch.no_grad():
        next(iter(made.tuned.parameters.values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan before the first update") as no:
        run_phase(made, folder=tmp_path, save_every=4, on_record=lambda r: None)
    assert "--lora-lr" not in str(no.value)


@pytest.mark.parametrize("wild", ["nan", "raises"])
def test_a_loss_that_is_not_finite_later_stops_with_advice(tmp_path: Path, wild: str) -> None:
    made = learner()
    step = made.step

    def diverging(index: int) -> Record:
        record = step(index)
        if index < 6:
            return record
        if wild == "raises":
            raise FloatingPointError("what a projection reads is no longer finite")
        return dataclasses.replace(record, loss=float("nan"))

    made.step = diverging  # type: ignore[method-assign]
    said = "the loss is nan" if wild == "nan" else "no longer finite"
    with pytest.raises(FloatingPointError, match=rf"diverges .*{said}.*--lora-lr"):
        run_phase(made, folder=tmp_path, save_every=4, on_record=lambda r: None)


def test_a_diverging_phase_goes_back_to_its_checkpoint_at_half_the_rate(tmp_path: Path) -> None:
    made = learner()
    step = made.step
    wild = iter([True])

    def stumbles(index: int) -> Record:
        record = step(index)
        if index == 6 and next(wild, False):
            return dataclasses.replace(record, loss=float("inf"))
        return record

    made.step = stumbles  # type: ignore[method-assign]
    said: list[str] = []
    state = run_phase(
        made, folder=tmp_path, save_every=4, on_record=lambda r: None, say=said.append
    )
    assert (state.step, state.rate) == (12, 0.5)
    assert said == ["control, the loss is inf; back to step 4 at rate x0.5"]
    history = read_history(tmp_path)
    assert [r.step for r in history] == list(range(12))
    assert history[11].lr == pytest.approx(history[3].lr / 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_after_the_step_which_is_saved(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Between two checkpoints: going on makes what an uninterrupted phase makes."""

    def hear(number: int, frame: object) -> None:
        raise Stopped(number)

    before, made = signal.signal(number, hear), learner()
    step, said = made.step, list[str]()

    def interrupted(index: int) -> Record:
        if index == 5:
            os.kill(os.getpid(), number)
        return step(index)

    made.step = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(Stopped):
            run_phase(
                made, folder=tmp_path, save_every=4, on_record=lambda r: None, say=said.append
            )
        assert signal.getsignal(number) is hear
    finally:
        signal.signal(number, before)
    assert saved_step(tmp_path) == "joint up to step 6"
    assert len(read_history(tmp_path)) == 6
    assert said == [f"{number.name}: saving after this step (again: stop without saving)"]
    again, whole = learner(), learner()
    run_phase(again, folder=tmp_path, save_every=4, on_record=lambda r: None)
    run_phase(whole, folder=tmp_path / "whole", save_every=4, on_record=lambda r: None)
    for name, parameter in whole.tuned.parameters.items():
        assert torch.equal(parameter, again.tuned.parameters[name]), name


def test_the_signs_of_divergence() -> None:
    def records(losses: list[float], churn: float | None = None) -> list[Record]:
        return [
            Record(step=i, phase="control", loss=x, lr=0.1, tokens=1, churn=churn)
            for i, x in enumerate(losses)
        ]

    assert diverges(records([5.0 - 0.1 * i for i in range(30)])) is None
    assert diverges(records([3.0, 2.1, 3.9] * 8)) is None
    assert diverges(records([3.0] * 20 + [4.5] * 16)) == "the loss rose from 3.00 to 4.50"
    # Blocks that are hard for any model, as they came in a row of licence texts.
    hard = [2.9, 3.6, 2.4, 3.0, 4.9, 2.6, 2.7, 4.6, 2.3, 3.6, 2.3, 4.8, 3.3, 3.5, 5.9, 5.3]
    assert diverges(records([2.6] * 32 + hard)) is None
    # A window of easy text, a nat below one of hard text that came a hundred steps later.
    easy = [1.6, 1.0, 1.4, 0.7, 1.8, 2.2, 2.5, 1.1, 1.4, 1.0, 1.7, 1.5, 1.3, 1.1, 3.2, 2.1]
    hard = [2.7, 2.0, 3.3, 3.0, 2.8, 2.3, 0.8, 2.2, 2.6, 2.5, 2.3, 2.3, 2.7, 2.8, 1.8, 3.6]
    assert diverges(records([2.3] * 384 + easy + [2.3] * 79 + hard)) is None
    assert diverges(records([3.0] * 8, churn=0.3)) == "30% of the decision changes at every step"
    assert diverges(records([3.0] * 8, churn=0.02)) is None


def test_a_phase_stops_early_and_keeps_its_best_step(tmp_path: Path) -> None:
    def tuner() -> Tuner:
        # Validated on text unlike the text it learns by heart at a high rate.
        config = dataclasses.replace(CONFIG, steps=400)
        other = Blocks(input_ids=TRAIN_IDS.flip(0)[:4], labels=TRAIN_IDS.flip(0)[:4])
        return Tuner(lora_model(), BLOCKS.first(2), config, Accelerator(cpu=True), phase="dense",
                     validation=other)  # fmt: skip

    made = tuner()
    state = run_phase(made, folder=tmp_path, save_every=10, on_record=lambda r: None, patience=0.05)
    assert state.worse == 2
    assert state.best_step == state.step - 20 < 380
    assert made.validate() == pytest.approx(state.best_loss)
    # A finished phase that is asked again takes the same step.
    again = tuner()
    run_phase(again, folder=tmp_path, save_every=10, on_record=lambda r: None, patience=0.05)
    for name, parameter in made.tuned.parameters.items():
        assert torch.equal(parameter, again.tuned.parameters[name]), name


@pytest.mark.parametrize(("patience", "ends", "keeps"), [(0.5, 40, 40), (0.3, 20, 8), (0, 40, 40)])
def test_patience_is_a_share_of_the_phase(
    tmp_path: Path, patience: float, ends: int, keeps: int
) -> None:
    made = learner()
    made.last_step = 40
    losses = iter([3.0, 2.0, 2.1, 2.2, 2.1, 2.1, 1.9, 1.8, 1.8, 1.7])  # of every 4 steps
    made.validate = lambda: next(losses)  # type: ignore[method-assign]
    made.step = lambda index: Record(  # type: ignore[method-assign]
        step=index, phase="control", loss=1.0, lr=0.1, tokens=1
    )
    state = run_phase(
        made, folder=tmp_path, save_every=4, on_record=lambda r: None, patience=patience
    )
    assert state.step == ends
    assert (state.best_step if state.worse else state.step) == keeps


@pytest.mark.parametrize("name", ["state.pt", "best.pt"])
def test_a_damaged_checkpoint_is_never_read(tmp_path: Path, name: str) -> None:
    def made() -> Tuner:
        tuner = Tuner(lora_model(), BLOCKS, CONFIG, Accelerator(cpu=True), phase="dense",
                      validation=BLOCKS.first(2))  # fmt: skip
        run_phase(tuner, folder=tmp_path, save_every=4, on_record=lambda r: None, patience=0.5)
        return tuner

    weights = [w.detach().numpy().tobytes() for w in made().tuned.parameters.values()]
    file = tmp_path / "checkpoint" / name
    kept = {f: f.read_bytes() for f in file.parent.iterdir()}
    assert set(kept) == {file.parent / "state.pt", file.parent / "best.pt"}
    said: list[str] = []
    drop_damaged(tmp_path, said.append)
    assert said == []
    places = [kept[file].index(weight) for weight in weights if weight in kept[file]]
    assert len(places) > 20
    flipped = [bytearray(kept[file]) for _ in places]
    for content, place in zip(flipped, places, strict=True):
        content[place] ^= 4
    damages = [*map(bytes, flipped), kept[file][:-200], b"weights", b""]
    for damaged in damages:
        file.write_bytes(damaged)
        drop_damaged(tmp_path, said.append)
        assert f"{file} is damaged" in said[-1]
        assert "without it the phase begins anew" in said[-1]
        assert list(file.parent.iterdir()) == []
        for path, content in kept.items():
            path.write_bytes(content)
    assert len(said) == len(damages)
    file.unlink()
    drop_damaged(tmp_path, said.append)
    assert (f"{file} is gone" in said[-1]) == (name == "best.pt")
    if name == "state.pt":
        for damaged, trouble in (
            (damages[0], "is damaged"),
            (kept[file.parent / "best.pt"], "is no"),
        ):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{file} {trouble}"):
                made()
