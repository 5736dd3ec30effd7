"""In a process of its own: what other tests have freed would be measured, too."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to keep"
)


def grown(script: str) -> list[float]:
    """What a script prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(done.stdout)
    return found


_FREED = """
import json, psutil, torch
from atp_edge.run.freed_memory import giving_back_freed_memory, keep_freed_memory

def resident():
    return psutil.Process().memory_info().rss / 2**20

def use_and_free_64_mib():
    torch.ones(16 << 20)

torch.set_num_threads(1)
assert keep_freed_memory()
grown = []
with giving_back_freed_memory("cpu"):
    before = resident()
    use_and_free_64_mib()
    grown.append(resident() - before)
before = resident()
use_and_free_64_mib()
grown.append(resident() - before)
with giving_back_freed_memory("cpu"):
    grown.append(resident() - before)
with giving_back_freed_memory("cuda"):
    use_and_free_64_mib()
    grown.append(resident() - before)
print(json.dumps(grown))
"""
"""MiB by which the process grows while 64 are used and freed, once they are freed."""


def test_what_a_step_frees_is_kept_and_what_a_pass_frees_is_given_back() -> None:
    in_a_pass, after_a_step, in_the_next_pass, elsewhere = grown(_FREED)
    assert in_a_pass < 16
    assert after_a_step > 48
    assert in_the_next_pass < 16, "what steps left does not stand beside a pass"
    assert elsewhere > 48, "only a CPU's pass changes what is kept"


_HOLES = """
import json, psutil, time, torch
from contextlib import nullcontext
from atp_edge.run.freed_memory import (
    give_back_freed_memory, keep_freed_memory, stop_keeping_freed_memory, trimmed
)

torch.set_num_threads(1)
assert keep_freed_memory()
held, stays = [], []
for i in range(64):
    held.append(torch.ones(1 << 20))
    if i % 32 == 31:
        stays.append(bytearray(1 << 16))
held.clear()
stop_keeping_freed_memory()
grown = []
for meanwhile in (nullcontext(), trimmed()):
    give_back_freed_memory()
    before = psutil.Process().memory_info().rss / 2**20
    with meanwhile:
        torch.ones(16 << 20)
        time.sleep(2)
        grown.append(psutil.Process().memory_info().rss / 2**20 - before)
print(json.dumps(grown))
"""
"""MiB by which the process grows while 64 are used and freed in a heap with holes of 128."""


def test_what_is_freed_in_the_holes_of_a_heap_is_given_back_meanwhile() -> None:
    kept, trimmed = grown(_HOLES)
    assert kept > 48
    assert trimmed < 16
