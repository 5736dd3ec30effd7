"""The command line. Every setting of the configuration is a flag; see `atp-edge run --help`.

Exit codes: 0 done; 1 the export does not equal its model; 2 wrong use or bad input; 3 training
diverged; 4 a condition that was asked for is not met; 5 an error of atp-edge itself; 130 and 143
stopped by SIGINT (Ctrl-C) and SIGTERM (call it again to go on). A closed output (`| head`) changes
none of them: the work goes on unheard.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.cli.bench import bench
from atp_edge.cli.export import export, verify_folder
from atp_edge.cli.flags import Settings, takes_settings
from atp_edge.cli.gate import gate
from atp_edge.cli.generate import generate
from atp_edge.cli.push import push
from atp_edge.cli.shown import Log, Shown, Track
from atp_edge.config import Config
from atp_edge.run.errors import ConditionNotMetError, NotProvenError, Stopped
from atp_edge.run.records import STAGES, StageName

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="From a Hugging Face decoder and domain text to a slim model shipped as ONNX.",
    epilog="Exit codes: 0 done, 1 export not equal to its model, 2 wrong use or bad input, "
    "3 training diverged, 4 a condition that was asked for not met, 5 an error of atp-edge itself, "
    "130 and 143 stopped by SIGINT and SIGTERM (call it again to go on).",
)
app.add_typer(bench, name="bench")
console = Console(highlight=False)
EXIT_USAGE, EXIT_INTERNAL, EXIT_SIGNAL = 2, 5, 128
EXIT_CODES: Mapping[type[Exception], int] = {
    NotProvenError: 1,
    FloatingPointError: 3,
    ConditionNotMetError: 4,
    ValueError: EXIT_USAGE,
    OSError: EXIT_USAGE,
}
"""Of errors that say all there is to say; any other is a fault of ours."""

Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="then upload onnx/ to the Hub, private"),
]
RunOption = Annotated[Path, typer.Option("--out", help="the run's folder")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="show the costs and the memory, then stop")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="CONDITION",
        help='end with code 4 unless met: "perplexity<untouched", "recovery>=0.9"; repeatable',
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option("--device-memory", help="a GPU of so much (80GB), not the device at hand"),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"atp-edge {importlib.metadata.version('atp-edge')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _atp_edge(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="its version"),
    ] = False,
) -> None:
    pass


@app.command()
@takes_settings
def run(
    settings: Settings,
    *,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    require: Require = None,
    push_to: Push = None,
    log: Log = "text",
    track: Track = None,
) -> None:
    """The whole way: train, shrink, export, verify, bench, gate, report. Goes on where it was."""
    from atp_edge.pipeline.require import check_conditions, parse_conditions

    conditions = parse_conditions(require or ())
    if push_to is not None:
        from atp_edge.run.hub import check_name

        check_name(push_to)
    call = Call(dry_run=dry_run, device_memory=device_memory, shown=Shown(log=log, track=track))
    metrics = _stages(settings, STAGES, call)
    if metrics is not None:
        check_conditions(conditions, metrics)
        if push_to is not None:
            push(push_to, Path(settings.config.out))


@app.command()
@takes_settings
def train(
    settings: Settings,
    *,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    log: Log = "text",
    track: Track = None,
) -> None:
    """Learn LoRA and the pruning decision together; writes plan.json, dense/ and adapter/."""
    call = Call(dry_run=dry_run, device_memory=device_memory, shown=Shown(log=log, track=track))
    _stages(settings, ("train",), call)


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a command was called, beside the settings of its run."""

    dry_run: bool
    device_memory: str | None
    shown: Shown


def _fitted(settings: Settings, names: tuple[StageName, ...], call: Call) -> Config:
    """The settings to run with, when all that can be known before has been checked and shown."""
    from atp_edge.pipeline.cost_estimate import cost_table, needs_table, sized_model
    from atp_edge.pipeline.device import device_of
    from atp_edge.pipeline.fit import begun_settings, fitted, refuse
    from atp_edge.pipeline.inputs import inputs_of
    from atp_edge.pipeline.memory import needs_of
    from atp_edge.pipeline.preflight import check_run
    from atp_edge.run.folder import RunFolder
    from atp_edge.training.setup import model_source, shapes_alone, splits_of

    config, said = settings.config, settings.said
    out = Path(config.out)
    device = device_of(call.device_memory, out)
    alone = call.dry_run and shapes_alone(model_source(config.model))
    check_run(config, names, weights=not alone)
    if alone:
        inputs_of(config)  # That the text is there.
        console.print("no weights there: checked on the model's shapes alone, and no text read")
    config = begun_settings(config, said, RunFolder(out))
    model = sized_model(config)
    config, chosen = fitted(config, model, said, device)
    if chosen and call.shown.for_people:
        console.print(Text(chosen))
    # What a run would read next, and refuse.
    splits = splits_of(config) if call.dry_run and not alone else None
    if call.shown.for_people or call.dry_run:
        console.print(cost_table(config, splits))
        console.print(needs_table(needs_of(config, model, device.kind), device))
    refuse(config, model, device)
    return config


def _stages(settings: Settings, names: tuple[StageName, ...], call: Call) -> dict[str, Any] | None:
    """The figures of the run; None of a dry run, and on every rank but the first."""
    from atp_edge.pipeline.launch import check_ranks, follow, leading
    from atp_edge.run import ranks
    from atp_edge.run.progress import Terminal

    ranks.join()
    check_ranks(settings.config)
    if not ranks.is_main():
        follow(settings.config, Terminal(Console(quiet=True)))
        return None
    with leading():
        return _lead(settings, names, call)


def _lead(settings: Settings, names: tuple[StageName, ...], call: Call) -> dict[str, Any] | None:
    from atp_edge.pipeline.stages import run_stages
    from atp_edge.pipeline.summary import table
    from atp_edge.pipeline.verdict import TONE_STYLE, verdict_of

    shown = call.shown
    shown.check()
    config = _fitted(settings, names, call)
    if call.dry_run:
        return None
    with shown.progress(console, config) as progress:
        folder = run_stages(config, names, progress)
    metrics = folder.metrics()
    verdict = verdict_of(metrics)
    shown.end(console, metrics, verdict.sentence)
    if not shown.for_people:
        return metrics
    console.print(table(metrics))
    console.print(Text(verdict.sentence, style=TONE_STYLE[verdict.tone]))
    for advice in verdict.advice:
        console.print(Text(advice))
    if "report" in names:
        console.print(Text(f"report: {folder.path / 'report.html'}"), soft_wrap=True)
    return metrics


def _one_stage(name: StageName, out: Path) -> None:
    """Run one stage again on a run's folder."""
    from atp_edge.pipeline.stages import run_stage, taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal
    from atp_edge.run.records import WORK

    folder, source = RunFolder(out), name in WORK and WORK[name].source
    with Terminal(console) as progress, taken_up(folder, progress, source=source) as config:
        run_stage(name, config, folder, progress)


@app.command()
def shrink(out: RunOption) -> None:
    """Write the slim checkpoint from the plan and the tuned weights."""
    _one_stage("shrink", out)


app.command()(export)


@app.command()
def verify(
    out: Annotated[Path | None, typer.Option("--out", help="the run's folder")] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="check a shipped folder against its manifest instead")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="with --out: one that `export --to` wrote of this run")
    ] = None,
) -> None:
    """Prove the ONNX model equal to the PyTorch one, or a shipped folder to be what was shipped."""
    if (out is None) == (manifest is None) or (folder and out is None):
        raise ValueError("verify takes either --out RUN (and --folder) or --manifest FOLDER")
    if manifest is not None:
        from atp_export.manifest import MANIFEST, file_sha256, verify_manifest

        provenance = verify_manifest(manifest)
        console.print(
            f"{manifest}: every file is what was shipped, and there are no others\n"
            "This finds damage, not a forger: the manifest is not signed. Compare its own SHA-256 "
            f"with the sender's:\n{file_sha256(manifest / MANIFEST)}",
            markup=False,
            soft_wrap=True,
        )
        console.print_json(json.dumps(provenance))
    elif out is not None and folder is not None:
        verify_folder(out, folder)
    elif out is not None:
        _one_stage("verify", out)


app.command()(gate)


@app.command()
def report(out: RunOption, require: Require = None) -> None:
    """Write report.html from what the run has so far."""
    from atp_edge.pipeline.require import check_conditions, parse_conditions
    from atp_edge.run.folder import RunFolder

    conditions = parse_conditions(require or ())
    _one_stage("report", out)
    console.print(Text(f"report: {out / 'report.html'}"), soft_wrap=True)
    check_conditions(conditions, RunFolder(out).metrics())


app.command()(push)
app.command()(generate)


@app.command()
def doctor() -> None:
    """What this machine has, what will be used, and what is missing."""
    from atp_edge.cli.doctor import diagnose, next_step, render

    findings = diagnose()
    console.print(render(findings))
    console.print(Text(next_step(findings)))
    if any(f.name == "ONNX Runtime" and f.status == "missing" for f in findings):
        raise typer.Exit(EXIT_USAGE)


def main() -> None:
    """Entry point: errors are one clear line, and an exit code that scripts can read."""
    # Read when transformers is imported, which a command does when it needs it: it takes seconds.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING)
    # peft reads a name that transformers is about to rename; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    Console.on_broken_pipe = _go_on_unheard  # type: ignore[method-assign]
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and `&` leave it
            signal.signal(number, _stop)
    try:
        app()
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        message = "; ".join(getattr(stopped, "__notes__", ["nothing was written"]))
        _end(EXIT_SIGNAL + stopped.signal, f"stopped by {name}:", message)
    except SystemExit as ended:
        # Typer's own 1: for an answer that never came, or a pipe that only it wrote to.
        sys.exit(EXIT_USAGE if ended.code == 1 else ended.code)
    except Exception as error:
        code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), EXIT_INTERNAL)
        if code == EXIT_INTERNAL:
            traceback.print_exc()
            _end(code, "internal error:", f"please report it with all of this ({_versions()})")
        _end(code, "error:", str(error))


def _end(code: int, title: str, message: str) -> NoReturn:
    # As text, for in markup a path like x[/y] is a tag.
    shown = Text.assemble((title, "red"), " ", message)
    Console(stderr=True, highlight=False).print(shown, soft_wrap=True)
    sys.exit(code)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def _go_on_unheard(self: Console) -> None:
    """What read the output has gone; the work goes on to its end, with the code that it ends by."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def _versions() -> str:
    from atp_edge.run.environment import PACKAGES, version

    found = {name: version(name) for name in ("atp-edge", *PACKAGES)}
    return ", ".join(
        ["Python " + sys.version.split()[0], *(f"{k} {v}" for k, v in found.items() if v)]
    )
