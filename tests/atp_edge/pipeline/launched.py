"""`launched.py FAULT ARGS...`: the command line on a rank of a launch, with a fault on rank 1.

none; watched: it says how many matrices of its layers lie whole on it between two steps; killed: it
is killed in the joint phase; apart: its decisions are others before the ranks agree; unguarded:
they are, and rank 0's are not taken.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from atp_edge.cli import main
from atp_edge.model.structures import Masks
from atp_edge.run import ranks
from atp_edge.run.history import Record
from atp_edge.run.progress import Terminal
from atp_edge.training import learners


def die(self: Terminal, record: Record) -> None:
    if record.phase == "control" and record.step == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def count_whole(self: Terminal, record: Record) -> None:
    """Of all models that there are in the joint phase."""
    if record.phase == "control" and record.step == 2:
        found: list[Any] = [m for m in gc.get_objects() if isinstance(m, PreTrainedModel)]
        layers = [m.get_submodule("model.layers") for m in found if hasattr(m, "lm_head")]
        projections = [m for x in layers for m in x.modules() if isinstance(m, nn.Linear)]
        frozen = [m.weight for m in projections if not m.weight.requires_grad]
        here = [w for w in frozen if not w.is_meta]
        whole = sum(not isinstance(w, DTensor) for w in here)
        sys.stderr.write(f"held whole between steps: {whole} of {len(here)}\n")


def turned(masks: Any) -> Masks:
    """Every site's mask by one place."""
    return agreed([mask.roll(1) for mask in masks])


fault = sys.argv.pop(1)
if os.environ["RANK"] == "1":
    agreed = learners._agreed
    if fault in ("apart", "unguarded"):
        learners._agreed = turned
    elif fault == "watched":
        Terminal.record = count_whole  # type: ignore[method-assign]
    elif fault == "killed":
        Terminal.record = die  # type: ignore[method-assign]
if fault == "unguarded":
    ranks.take_from_main = lambda masks: None
main()
