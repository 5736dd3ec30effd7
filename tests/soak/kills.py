"""SIGKILL at random moments of a run, and of its resumes.

    python -m tests.soak.kills --count 300 --folder build/soak/kills

What a kill leaves is gone on with; of training at most what came after the last checkpoint is done
again, and the end equals, bit for bit, that of the run that nobody killed. Every kill is a line of
kills.jsonl, and called again the command goes on until there are `count`.

Each process is forked from this one, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm.std import TqdmDefaultWriteLock

from atp_edge.config import Config
from atp_edge.data.domains import DOMAINS
from atp_edge.gate import judge as _judge  # noqa: F401 - imported here, once for all forks
from atp_edge.pipeline import bench, export, gate, report, shrink, train, verify  # noqa: F401
from atp_edge.pipeline.stages import run_stages
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256
from atp_edge.run.records import FOLDERS, PLAN, STAGES, TUNED, WORK, StageName
from atp_edge.settings import configured
from tests.tiny import QUICK_GATE, QUICK_TO_TRAIN, Silent, save_tiny_source

SAVE_EVERY = 2
PHASES = ("dense", "control", "recovery")
SETTINGS = QUICK_TO_TRAIN | {
    "steps": 12, "train.save_every": SAVE_EVERY, "bench.rounds": 1, "bench.prompt_tokens": 4,
    "bench.new_tokens": 2, "gate.config": QUICK_GATE,
}  # fmt: skip
LONGEST_SECONDS = 600
CHANCE_OF_ANOTHER, MOST_KILLS = 0.8, 5
"""That a resume is killed too, and of one run at most."""
_PARTS = ("tune_dense", "learn_decision", "recover")
# Else all forks share it: one that is killed while it holds it would stop every later one.
TqdmDefaultWriteLock.mp_lock = None


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. stage: what the run had not done yet, '' where it had ended by itself before.

    seconds: from the start of the process. resumes: how often the run had been killed before.
    lost: steps that were done again after it.
    """

    stage: str
    seconds: float
    resumes: int
    lost: int = 0


class Logged(Silent):
    """Progress that leaves a line a step in a file, as it goes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def record(self, *records: Any) -> None:
        with self.file.open("a") as lines:
            lines.writelines(f"{r.phase} {r.step}\n" for r in records)


def source_in(folder: Path) -> Config:
    """A tiny model and text for it; the settings of a run that nobody kills."""
    for read in DOMAINS.values():
        read()  # What the gate holds other text against: once, for all forks.
    if not (folder / "data.jsonl").exists():
        save_tiny_source(folder)
    named = {"model": folder / "model", "data": folder / "data.jsonl", "out": folder / "whole"}
    return configured(SETTINGS | {name: str(path) for name, path in named.items()})


def attempt(config: Config, stages: Sequence[StageName], log: Path, seconds: float | None) -> bool:
    """A process that runs these stages, killed after `seconds`; whether it ended before.

    Raises RuntimeError where it ended in an error, or not at all.
    """
    pid = os.fork()
    if not pid:
        _child(config, stages, log)
    began = time.monotonic()
    while time.monotonic() - began < (LONGEST_SECONDS if seconds is None else seconds):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"status {status}: {log.with_suffix('.error').read_text()}")
            return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if seconds is None:
        raise RuntimeError(f"it did not end in {LONGEST_SECONDS} seconds")
    return False


def _child(config: Config, stages: Sequence[StageName], log: Path) -> NoReturn:
    try:
        run_stages(config, stages, Logged(log))
    except BaseException:
        log.with_suffix(".error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def steps_of(log: Path) -> list[tuple[str, int]]:
    """(phase, step) in the order that they were done in."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(phase, int(step)) for phase, step in map(str.split, lines)]


def lost_of(before: tuple[str, int], after: tuple[str, int]) -> int:
    """Steps done again, of the last step before a kill and the first one after it. Raises
    RuntimeError where a phase that had ended is done again."""
    if before[0] == after[0]:
        return max(0, before[1] - after[1] + 1)
    if PHASES.index(after[0]) < PHASES.index(before[0]):
        raise RuntimeError(f"killed after {before}, it went on with {after}")
    return 0


def outcome(config: Config) -> dict[str, Any]:
    """What two runs of these settings have in common, to the bit."""
    run = RunFolder(Path(config.out))
    metrics = run.metrics()
    kept = {"train": ("perplexity", "plan_sha256"), "gate": ("verdict", "reasons")}
    figures = {
        f"{stage} {name}": metrics[stage][name]
        for stage, names in kept.items() if stage in metrics for name in names
    }  # fmt: skip
    return {"files": files_sha256(run.path, [*FOLDERS, TUNED, PLAN]), **figures}


def undone(config: Config) -> str:
    """The first part of the run that is not done."""
    done = RunFolder(Path(config.out)).records.names
    return next((x for x in WORK if x in (*_PARTS, *STAGES) and x not in done), "report")


def killed_run(
    config: Config, stages: Sequence[StageName], draw: random.Random, length: float
) -> list[Kill]:
    """A run that is killed once or more, and then let end.

    length: seconds of a run that nobody kills. Raises RuntimeError for what it should not do.
    """
    log = Path(config.out).with_suffix(".log")
    kills: list[Kill] = []
    marks: list[int] = []
    while len(kills) < MOST_KILLS and (not kills or draw.random() < CHANCE_OF_ANOTHER):
        seconds = draw.uniform(0, length / (2 if kills else 1))
        if attempt(config, stages, log, seconds):
            break
        kills.append(Kill(stage=undone(config), seconds=round(seconds, 3), resumes=len(kills)))
        marks.append(len(steps_of(log)))
    attempt(config, stages, log, None)
    return with_lost(kills, marks, steps_of(log))


def with_lost(kills: list[Kill], marks: list[int], steps: list[tuple[str, int]]) -> list[Kill]:
    """Raises RuntimeError where more than what came after the last checkpoint was lost."""
    found = []
    for kill, (mark, end) in zip(kills, pairwise([*marks, len(steps)]), strict=True):
        lost = lost_of(steps[mark - 1], steps[mark]) if 0 < mark < end else 0
        if lost > SAVE_EVERY:
            raise RuntimeError(f"{lost} steps were done again after {kill}: {steps}")
        found.append(replace(kill, lost=lost))
    return found


def soak(folder: Path, stages: Sequence[StageName], count: int, seed: int) -> Iterator[Kill]:
    """Kills until kills.jsonl has `count`, a run after the other. Raises RuntimeError for the first
    run that does not end as the one that nobody killed; its folder stays."""
    folder.mkdir(parents=True, exist_ok=True)
    config, table = source_in(folder), folder / "kills.jsonl"
    began = time.monotonic()
    attempt(config, stages, folder / "whole.log", None)
    told = folder / "seconds"
    if not told.exists():
        told.write_text(str(time.monotonic() - began))
    wanted, length = outcome(config), float(told.read_text())
    turns = itertools.count()  # A run that ended before its kill is drawn anew.
    while len(kills := kills_of(table)) < count:
        draw = random.Random(f"{seed} {len(kills)} {next(turns)}")
        one = replace(config, out=str(folder / "killed"))
        shutil.rmtree(one.out, ignore_errors=True)
        Path(one.out).with_suffix(".log").unlink(missing_ok=True)
        found = killed_run(one, stages, draw, length)
        if outcome(one) != wanted:
            raise RuntimeError(f"after {found} the run in {one.out} ended otherwise")
        with table.open("a") as lines:
            lines.writelines(json.dumps(vars(kill)) + "\n" for kill in found)
        yield from found


def kills_of(table: Path) -> list[Kill]:
    """Those so far."""
    rows = table.read_text().splitlines() if table.exists() else []
    return [Kill(**json.loads(row)) for row in rows]


def by_stage(kills: list[Kill]) -> str:
    """A Markdown table: kills, and steps lost, by what was not done yet."""
    counted = Counter(kill.stage for kill in kills)
    lost = {stage: max(k.lost for k in kills if k.stage == stage) for stage in counted}
    resumed = Counter(kill.stage for kill in kills if kill.resumes)
    order = [name for name in (*_PARTS, *STAGES) if name in counted]
    rows = [f"| `{s}` | {counted[s]} | {resumed[s]} | {lost[s]} |" for s in order]
    total = f"| all | {len(kills)} | {sum(resumed.values())} | {max(lost.values(), default=0)} |"
    head = "| killed before the end of | kills | of a resume | most steps done again |"
    return "\n".join([head, "|---|---:|---:|---:|", *rows, total])


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--count", type=int, default=300)
    asked.add_argument("--folder", type=Path, default=Path("build/soak/kills"))
    asked.add_argument("--last", choices=STAGES, default=STAGES[-1], help="the last stage")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    stages = STAGES[: STAGES.index(given.last) + 1]
    for kill in soak(given.folder.resolve(), stages, given.count, given.seed):
        sys.stdout.write(json.dumps(vars(kill)) + "\n")
        sys.stdout.flush()
    sys.stdout.write(by_stage(kills_of(given.folder / "kills.jsonl")) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()
