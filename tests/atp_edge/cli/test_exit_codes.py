"""Exit codes, and what is printed beside them: as it is, whatever it holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from atp_edge import cli
from atp_edge.run.errors import ConditionNotMetError, NotProvenError, Stopped

COMMAND = [sys.executable, "-c", "from atp_edge.cli import main; main()"]


def ended(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int | str | None:
    """The exit code of the command line where a command does this."""
    monkeypatch.setattr(cli, "app", work)
    with pytest.raises(SystemExit) as code:
        cli.main()
    return code.value.code


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotProvenError("x[/y].jsonl"), 1),
        (ValueError("x[/y].jsonl"), 2),
        (OSError("x[/y].jsonl"), 2),
        (FloatingPointError("x[/y].jsonl"), 3),
        (ConditionNotMetError("x[bold]y :smile:"), 4),
    ],
)
def test_an_error_has_its_code_and_its_text_as_it_is(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [KeyError("kept"), RuntimeError("shapes"), TypeError("[/x]")])
def test_a_fault_of_ours_is_a_traceback_to_report_and_never_not_proven(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, raising(error)) == 5
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert f"{type(error).__name__}: {error}" in shown
    assert "internal error: please report it with all of this (Python 3." in shown
    assert "torch " in shown


@pytest.mark.parametrize(
    "work",
    [
        lambda: bytearray(1 << 60),
        lambda: np.ones(1 << 50),
        lambda: torch.empty(1 << 45),
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ],
    ids=["Python", "numpy", "torch", "CUDA"],
)
def test_where_memory_runs_out_one_error_says_what_takes_less(
    work: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(monkeypatch, work) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: memory ran out (")
    assert "`atp-edge run --dry-run` tells what a run takes" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_is_saved(
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Stopped as stopped:
            stopped.add_note("saved: nothing of x[/y] yet")
            raise

    assert ended(monkeypatch, work) == code
    assert capsys.readouterr().err == f"stopped by {number.name}: saved: nothing of x[/y] yet\n"


def test_a_stopped_matrix_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atp_bench.quality.runner.run_matrix", stopped_matrix)
    out, file = tmp_path / "work", tmp_path / "found.json"
    asked = ["bench", "quality", "--quick", "--out", str(out), "--json", str(file)]
    assert ended(monkeypatch, partial(cli.app, asked)) == 143
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"stopped by SIGTERM: finished cells are in {file}, training in {out}")


def stopped_matrix(*_: object, **__: object) -> NoReturn:
    raise Stopped(signal.SIGTERM)


class Dies:
    """A signal comes while it is taken down."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_a_signal_that_a_destructor_swallows_ends_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        Dies()
        time.sleep(60)

    assert ended(monkeypatch, work) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: the same command starts again\n"


def unheard(program: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a program whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    return done.returncode, done.stderr


def test_a_closed_output_is_no_error_and_stops_no_work() -> None:
    assert unheard([*COMMAND, "--help"]) == (0, "")
    work = """
from atp_edge import cli
from atp_edge.run.errors import NotProvenError
def work():
    for i in range(3):
        cli.console.print(f"step {i}")
    print("a library's own words")
    raise NotProvenError("worked to its end")
cli.app = work
cli.main()
"""
    assert unheard([sys.executable, "-c", work]) == (1, "error: worked to its end\n")


def test_a_path_that_looks_like_markup_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = cli.app
    for file in ("x[/y].toml", "x[bold]y.toml"):
        monkeypatch.setattr(sys, "argv", ["atp-edge", "train", "--config", file])
        assert ended(monkeypatch, app) == 2
        assert f"error: {file}: no such file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["atp-edge", "train", "x[/y]"])
    assert ended(monkeypatch, app) == 2
    assert "(x[/y])" in capsys.readouterr().err


def test_what_the_terminal_cannot_show_is_replaced_and_ends_nothing() -> None:
    code = (
        "from atp_edge import cli; from rich.console import Console; "
        "cli.app = lambda: Console().print('naïve 患者 ┃'); cli.main()"
    )
    ascii_alone = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=ascii_alone, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "na?ve ?? ?\n")
