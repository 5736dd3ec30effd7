"""Sections one after another, each in a process of its own; what they found, in one file.

A section writes its JSON part as it goes. The results are merged and written after every one, so
that whatever ends the command, what was measured is there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_edge.run.files import write_atomically

Measure = Callable[[Any, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""(sizes, keep what was found so far) -> what was found."""
_GRACE = 5.0
"""Seconds from a section's alarm until its process is ended: a kernel that hangs hears none."""
_LEAST = 5.0
"""Seconds left of the whole below which no section begins."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """seconds: its alarm, at real size. interpreted: at toy size Triton's kernels run on its
    interpreter."""

    load: Callable[[], Measure]
    seconds: float
    interpreted: bool = False


class OutOfTimeError(Exception):
    """The section's alarm."""


def run_sections(
    names: Mapping[str, Section],
    command: list[str],
    *,
    seconds: float,
    out: Path,
    toy: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Every section by `command` + [its name, its file, its alarm's time], in turn, within
    `seconds`.

    Returns what was written to `out`: by section its status, seconds and figures.
    """
    began = time.monotonic()
    found: dict[str, Any] = {"toy": toy, "sections": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name, section in names.items():
            left = seconds - (time.monotonic() - began)
            part = Path(scratch) / f"{name}.json"
            at_most = min(section.seconds, left - _GRACE)
            if at_most < _LEAST:
                row: dict[str, Any] = {"status": "no time was left"}
            else:
                interpreted = toy and section.interpreted
                until = str(time.time() + at_most)
                row = _run_section([*command, name, str(part), until], part, at_most,
                                   interpreted=interpreted)  # fmt: skip
            found["sections"][name] = row
            found["seconds"] = time.monotonic() - began
            write_atomically(out, json.dumps(found, indent=1, sort_keys=False) + "\n")
            say(f"{name}: {row['status']}, {row.get('seconds', 0):.0f} s")
    return found


def _run_section(
    command: list[str], part: Path, seconds: float, *, interpreted: bool
) -> dict[str, Any]:
    began = time.monotonic()
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        _, said = process.communicate(timeout=seconds + _GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    row: dict[str, Any] = json.loads(part.read_text("utf-8")) if part.is_file() else {}
    if process.returncode or row.get("status") in (None, "running"):
        row["status"] = "killed" if process.returncode == -signal.SIGKILL else "ended early"
        row["stderr"] = said[-2000:]
    return row | {"seconds": time.monotonic() - began}


def run_one(measure: Callable[[], Measure], sizes: Any, part: Path, until: float) -> None:
    """A section in this process, until a time of the clock: its figures, or why there are none, in
    `part`."""

    def write(status: str, found: dict[str, Any], **more: Any) -> None:
        row = {"status": status, **more, "found": found}
        write_atomically(part, json.dumps(row, default=str))

    kept: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        kept.update(found)
        write("running", kept)

    try:
        with _alarm(max(0.1, until - time.time())):
            write("done", measure()(sizes, keep))
    except ModuleNotFoundError as error:
        write("missing", kept, missing=error.name)
    except OutOfTimeError:
        write("out of time", kept)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:1000]
        write("failed", kept, error=said, trace=traceback.format_exc()[-3000:])


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def python(script: Path) -> list[str]:
    """This Python on a script."""
    return [sys.executable, str(script)]
