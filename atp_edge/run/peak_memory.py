"""The most memory that each part of a run holds, beside what `--dry-run` says of it.

On Linux the kernel keeps a high-water mark of a process's resident memory, which can be set back;
elsewhere nothing is noted of the host. torch keeps the same of a GPU's memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from atp_edge.run import ranks
from atp_edge.run.files import update_json, write_json
from atp_edge.run.freed_memory import give_back_freed_memory

_STATUS, _MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SET_BACK = "5"  # proc(5), clear_refs


@contextmanager
def peak_noted(part: str, path: Path) -> Iterator[None]:
    """Note in a JSON file how much memory was held at most inside, in bytes: `host`, resident, all
    of the process; `device`, allocated by torch on a GPU. What ends early notes nothing.

    What was held before and is no longer used is given back first, and does not stand beside it."""
    give_back_freed_memory()
    known = set_back()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield
    found = {"host": resident_peak()} if known else {}
    if cuda:
        found["device"] = torch.cuda.max_memory_allocated()
    if found and ranks.is_main():
        try:
            update_json(path, part, found)
        except ValueError:  # Damaged. Nothing reads it but who wants to know.
            write_json(path, {part: found})


def set_back() -> bool:
    """Let the mark of resident memory begin anew; returns whether there is one."""
    try:
        _MARKS.write_text(_SET_BACK)
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """The mark, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
