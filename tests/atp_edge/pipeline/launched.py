"""`launched.py FAULT ARGS...`: the command line on a rank of a launch, with a fault on rank 1.

none; killed: it is killed in the joint phase; apart: its decisions are others before the ranks
agree; unguarded: they are, and rank 0's are not taken.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from atp_edge.cli import main
from atp_edge.model.structures import Masks
from atp_edge.run import ranks
from atp_edge.run.history import Record
from atp_edge.run.progress import Terminal
from atp_edge.training import learners


def die(self: Terminal, record: Record) -> None:
    if record.phase == "control" and record.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def turned(masks: Any) -> Masks:
    """Every site's mask by one place."""
    return agreed([mask.roll(1) for mask in masks])


fault = sys.argv.pop(1)
if os.environ["RANK"] == "1":
    agreed = learners._agreed
    if fault in ("apart", "unguarded"):
        learners._agreed = turned
    elif fault == "killed":
        Terminal.record = die  # type: ignore[method-assign]
if fault == "unguarded":
    ranks.take_from_main = lambda masks: None
main()
