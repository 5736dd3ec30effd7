"""The stages of a run in their order: each reads the run's folder and adds to it.

Each can be run again alone. A stage is imported when it runs: what one needs, others need not load.
What a stage leaves holds as long as all that it read and wrote is what it was (see
atp_edge.run.records).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from atp_edge.config import Config
from atp_edge.pipeline.expected_work import expected_work
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.run.freed_memory import trimmed
from atp_edge.run.hashes import difference, files_sha256
from atp_edge.run.history import PHASE_NAMES
from atp_edge.run.peak_memory import peak_noted
from atp_edge.run.pinned import pin_sources, settings_of
from atp_edge.run.precision import settled
from atp_edge.run.progress import Progress
from atp_edge.run.records import HISTORY, METRICS, REPORT, WORK, StageName
from atp_edge.run.stopping import heard_later, saying
from atp_edge.run.watched import tell_expected, tell_stage

Stage = Callable[[Config, RunFolder, Progress], None]
MEASURED = ("shrink", "export", "verify", "gate")
"""Stages whose memory is foretold as a whole; training's, part by part; a bench's processes hold
less than any."""


def run_stages(config: Config, names: Sequence[StageName], progress: Progress) -> RunFolder:
    """These stages of a run, new or gone on with: those that are not done, or no longer.

    Nothing is written before model, text and settings are known to be fit for it.
    """
    from atp_edge.pipeline.inputs import anchored, inputs_of
    from atp_edge.training.setup import splits_of

    config = settled(anchored(config))
    run, inputs = RunFolder(Path(config.out)), inputs_of(config)
    if not run.config_toml.exists():
        progress.say("reading the domain text")
        splits_of(config)
    run.check_places(names)
    with run.held(), saying(lambda: _saved(run)), _with_its_report(run, progress):
        open_run(config, inputs, progress.say)
        run.void_damaged(progress.say)
        tell_expected(expected_work(config, names))
        for number, name in enumerate(names, 1):
            tell_stage(name, number, len(names))
            if not _done(name, config, run, progress.say):
                run_stage(name, config, run, progress)
    return run


@contextmanager
def taken_up(run: RunFolder, progress: Progress, *, source: bool) -> Iterator[Config]:
    """A run that is there, for this process alone, and its settings.

    source: whether its model and text are read. Raises ValueError when they are not what the run
    began with.
    """
    config = run.config()
    again = "the same command does the rest"
    with run.held(), saying(lambda: _saved(run, again)), _with_its_report(run, progress):
        run.adopt(config, progress.say)
        run.void_damaged(progress.say)
        if source:
            from atp_edge.pipeline.inputs import inputs_of

            pin_sources(run.path, inputs_of(config), progress.say)
        yield config


@contextmanager
def measured(name: str, run: RunFolder) -> Iterator[None]:
    """Record a bench of a run, so that its figures go when what they are of does."""
    read = run.records.reads(name)
    yield
    run.records.keep(name, read=read)


def run_stage(
    name: StageName, config: Config, run: RunFolder, progress: Progress, stage: Stage | None = None
) -> None:
    """One stage of a run, and what read other work of it than there is now is void.

    stage: what is done, where it is not what a run does.

    Raises ValueError when what it reads is not there, or not as it was left.
    """
    run.check_places([name])
    if name == "report":
        _check_history(run)
        _stage(name)(config, run, progress)
        return
    run.require_read(name)
    if name != "gate":  # It writes nothing before its verdict: one that is refused changes nothing.
        run.void(name)
    # What is not done as the run's settings say is done again by `run`.
    read, settings = run.records.reads(name), {} if stage else done_by(config, name)
    began = time.perf_counter()
    try:
        with _watched_memory(name, run):
            (stage or _stage(name))(config, run, progress)
    except NotProvenError as error:
        run.records.keep(name, read=read, settings=settings, failed=str(error))
        raise
    run.add_metrics(name, {"seconds": time.perf_counter() - began} | run.metrics().get(name, {}))
    run.records.keep(name, read=read, settings=settings)
    for other, why in run.records.outdated_by(name).items():
        progress.say(f"{other} no longer holds: {why}")
        run.void(other)


@contextmanager
def _watched_memory(name: StageName, run: RunFolder) -> Iterator[None]:
    """Nothing that a stage frees stands beside what comes next; its peak is noted. Training does
    both itself, for its steps keep what they free."""
    if name == "train":
        yield
        return
    noted = peak_noted(name, run.memory_json) if name in MEASURED else nullcontext()
    with trimmed(), noted:
        yield


def _done(name: StageName, config: Config, run: RunFolder, say: Callable[[str], None]) -> bool:
    """Whether a stage is done and what it left holds; says so, or why it is done again."""
    if name == "report":
        return False
    trouble = run.records.trouble(name, done_by(config, name))
    if trouble is None:
        say(f"{name}: done before")
    elif name in run.metrics():
        say(f"{name} again: {trouble}")
    return trouble is None


def done_by(config: Config, name: StageName) -> dict[str, Any]:
    """What a stage is done by beside what training reads."""
    if name != "gate":
        return settings_of(config, name)
    from atp_edge.pipeline.gate import digest

    return {"thresholds": digest(config)[:12]}


def _check_history(run: RunFolder) -> None:
    """Raise ValueError for a history that is not what training wrote: nothing makes it again."""
    trained, now = run.records.get("train"), files_sha256(run.path, [HISTORY])
    wrote = {k: v for k, v in trained.wrote.items() if k == HISTORY} if trained else {}
    if wrote and now and (changed := difference(wrote, now)):
        raise ValueError(
            f"{run.path}: {changed}; put it back, or delete it and the report has no curves"
        )


@contextmanager
def _with_its_report(run: RunFolder, progress: Progress) -> Iterator[None]:
    """Write report.html again at the end, where there is one, it was not, and what it shows is no
    longer what it was: a page never shows the verdict on files that are gone."""
    page, before = run.path / REPORT, _page_and_figures(run)
    try:
        yield
    finally:
        now = _page_and_figures(run)
        if now["page"] and now["page"] == before["page"] and now != before:
            from atp_edge.pipeline.report import write_report

            try:
                with heard_later(lambda text: None):
                    write_report(run.path, run.stale())
            except (OSError, ValueError) as error:
                progress.say(f"{page} is of before, and could not be written again: {error}")


def _page_and_figures(run: RunFolder) -> dict[str, Any]:
    """When the page was written, and the SHA-256 of the figures and of what they are of."""
    page = run.path / REPORT
    figures = files_sha256(run.path, [METRICS, run.records.file.name])
    return {"page": page.stat().st_mtime_ns if page.is_file() else None, "figures": figures}


_SAVED = {
    "tune_dense": PHASE_NAMES["dense"],
    "learn_decision": PHASE_NAMES["control"],
    "recover": PHASE_NAMES["recovery"],
}
"""The parts of training, as the bars name them."""


def _saved(run: RunFolder, go_on: str = "") -> str:
    from atp_edge.training.loop import saved_step

    if not run.config_toml.exists():
        return "nothing was written"
    noted = [(name, run.records.get(name)) for name in WORK]
    done = [_SAVED.get(name, name) for name, record in noted if record and not record.failed]
    saved = [f"{', '.join(done)} done"] if done else []
    if "train" not in done and (step := saved_step(run.path)):
        saved.append(step)
    kept = "; ".join(saved) or "nothing of the training yet"
    go_on = go_on or f"go on with {run.command('run')}"
    return f"saved: {kept}; {go_on}"


def _stage(name: StageName) -> Stage:
    match name:
        case "train":
            from atp_edge.pipeline.launch import train_together

            return train_together
        case "shrink":
            from atp_edge.pipeline.shrink import shrink

            return shrink
        case "export":
            from atp_edge.pipeline.export import export

            return export
        case "verify":
            from atp_edge.pipeline.verify import verify

            return verify
        case "bench":
            from atp_edge.pipeline.bench import bench

            return bench
        case "gate":
            from atp_edge.pipeline.gate import gate

            return gate
        case "report":
            from atp_edge.pipeline.report import report

            return report
