"""What a person sees: rows on a terminal, a line now and then elsewhere, and the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from atp_edge.config import Config
from atp_edge.pipeline.expected_work import expected_work
from atp_edge.run import progress as shown
from atp_edge.run.history import Record
from atp_edge.run.progress import Terminal
from atp_edge.run.records import STAGES
from atp_edge.run.time_left import TimeLeft, in_words
from atp_edge.run.watched import counted, tell_expected, tell_stage, underway


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_what_was_measured() -> None:
    clock = Clock()
    left = TimeLeft([("dense", 30.0), ("measuring", 10.0), ("joint", 60.0)], clock)
    assert left.seconds() is None
    left.begin("dense")
    clock.now = 15.0
    left.reach("dense", 0.5)
    assert left.seconds() == pytest.approx(85.0)
    clock.now = 60.0
    left.begin("measuring")
    left.begin("something else")
    clock.now = 70.0
    left.reach("measuring", 0.5)
    assert left.seconds() == pytest.approx(70.0 / 35.0 * 65.0)


def test_what_was_done_before_is_passed_over() -> None:
    clock = Clock()
    left = TimeLeft([("dense", 300.0), ("joint", 60.0), ("bench", 40.0)], clock)
    left.begin("joint")
    clock.now = 30.0
    left.reach("joint", 0.5)
    assert left.seconds() == pytest.approx(70.0)


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "10 s"), (62, "60 s"), (95, "2 min"), (3600 * 2 + 61, "2 h 1 min")]
)
def test_times_are_rounded_as_people_say_them(seconds: float, said: str) -> None:
    assert in_words(seconds) == said


def test_the_expected_work_names_every_stage_in_order() -> None:
    names = [name for name, _ in expected_work(Config(), STAGES)]
    assert [n for n in names if n in STAGES] == list(STAGES)
    phases = [names.index(n) for n in ("dense baseline", "scoring", "joint", "recovery", "shrink")]
    assert phases == sorted(phases)
    assert all(units >= 0 for _, units in expected_work(Config(), STAGES))


def _worked(console: Console) -> None:
    with Terminal(console) as terminal:
        tell_expected([("train", 1.0), ("scoring", 3.0), ("joint", 4.0), ("bench", 4.0)])
        tell_stage("train", 1, 2)
        terminal.say("scoring the structures (importance)")
        for _ in counted(range(3), "scoring"):
            terminal.rows.refresh()
        terminal.phase("joint", 0, 4, 0.6)
        for i in range(4):
            with underway("validating", 1):
                list(counted(range(2), "measuring"))
            terminal.record(
                Record(step=i, phase="control", loss=2.5, lr=0.1, tokens=1, kept_share=0.7)
            )
            terminal.rows.refresh()
        tell_stage("bench", 2, 2)


def test_a_terminal_of_80_columns_has_the_stage_the_bar_and_no_longer_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shown, "SHOWN_AFTER_SECONDS", -1.0)
    out = io.StringIO()
    _worked(Console(file=out, width=80, force_terminal=True, color_system=None))
    rows = " ".join(out.getvalue().replace("━", "").split())
    for text in ("stage 1 of 2: train", "scoring 2/3", "joint", "4/4 loss 2.500 kept 0.700/0.600"):
        assert text in rows, text
    plain = out.getvalue().replace("\x1b", "\n").splitlines()
    assert max(len(line) for line in plain) <= 80 + 6  # and a control sequence


def test_where_there_is_no_terminal_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    _worked(Console(file=out, width=80))
    assert out.getvalue().splitlines() == [
        "  stage 1 of 2: train",
        "· scoring the structures (importance)",
        "  stage 2 of 2: bench",
    ]


def test_where_there_is_no_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shown, "PLAIN_LINE_SECONDS", 0.0)
    out = io.StringIO()
    _worked(Console(file=out, width=80))
    assert "  scoring 2/3\n" in out.getvalue()
    assert "  joint 3/4 loss 2.500 kept 0.700/0.600\n" in out.getvalue()


def test_a_phase_goes_on_after_it_was_validated_and_is_over_when_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shown, "SHOWN_AFTER_SECONDS", -1.0)
    with Terminal(Console(file=io.StringIO(), width=80, force_terminal=True)) as terminal:
        terminal.phase("recovery", 10, 14, None)
        for step, doing in ((10, "recovery"), (11, "recovery 1/4")):
            with underway("validating", 1):
                list(counted(range(2), "measuring"))
            assert (terminal.doing, terminal.busy) == (doing, None)
            terminal.record(Record(step=step, phase="recovery", loss=2.5, lr=0.1, tokens=1))
        terminal.say("recovery: taking step 11, the best on the decision split")
        list(counted(range(2), "measuring"))
        assert terminal.doing == "after measuring"


def test_what_is_counted_is_what_is_done_now() -> None:
    with Terminal(Console(file=io.StringIO(), width=80)) as terminal:
        list(counted(range(2), "matching"))
        assert terminal.now()[0] == "after matching"
        with underway("measuring", 40) as one_more:
            one_more()
            assert terminal.now()[0] == "measuring 1/40", "not what came before it"


def test_a_note_is_no_work() -> None:
    with Terminal(Console(file=io.StringIO(), width=80)) as terminal:
        terminal.say("cell/legal/0")
        assert terminal.doing == "cell/legal/0", "nothing better is known"
        terminal.say("comparing the slim ONNX model with PyTorch")
        terminal.say("near copies of documents in other splits left out: 6")
        assert terminal.doing == "comparing the slim ONNX model with PyTorch"


def test_work_that_nobody_watches_is_done_all_the_same() -> None:
    assert list(counted([1, 2, 3], "counting")) == [1, 2, 3]
