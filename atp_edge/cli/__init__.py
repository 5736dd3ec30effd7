"""The command line. Every setting of the configuration is a flag; see `atp-edge run --help`.

Exit codes: 0 done; 1 the export does not equal its model; 2 wrong use or bad input; 3 training
diverged; 4 a condition that was asked for is not met; 5 an error of atp-edge itself; 130 and 143
stopped by SIGINT (Ctrl-C) and SIGTERM (call it again to go on). A closed output (`| head`) changes
none of them: the work goes on unheard.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.cli.bench import bench
from atp_edge.cli.export import export, verify_folder
from atp_edge.cli.gate import gate
from atp_edge.cli.generate import generate
from atp_edge.cli.given import Commands
from atp_edge.cli.one_stage import one_stage
from atp_edge.cli.push import push
from atp_edge.cli.run import Require, run, train
from atp_edge.cli.wrapped import say_lines
from atp_edge.run.errors import ConditionNotMetError, NotProvenError, Stopped

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="From a Hugging Face decoder and domain text to a slim model shipped as ONNX.",
    epilog="Exit codes: 0 done, 1 export not equal to its model, 2 wrong use or bad input, "
    "3 training diverged, 4 a condition that was asked for not met, 5 an error of atp-edge itself, "
    "130 and 143 stopped by SIGINT and SIGTERM (call it again to go on).",
)
app.add_typer(bench, name="bench")
console = Console(highlight=False, emoji=False)
EXIT_USAGE, EXIT_INTERNAL, EXIT_SIGNAL = 2, 5, 128
EXIT_CODES: Mapping[type[Exception], int] = {
    NotProvenError: 1,
    FloatingPointError: 3,
    ConditionNotMetError: 4,
    ValueError: EXIT_USAGE,
    OSError: EXIT_USAGE,
}
"""Of errors that say all there is to say; any other is a fault of ours."""
_NO_MEMORY = ("can't allocate memory", "Failed to allocate memory", "bad_alloc")
_MOST_QUOTED = 160
_SENT_AGAIN_AFTER_S = 0.05
_LESS_MEMORY = (
    "`atp-edge run --dry-run` tells what a run takes, and settings that take less; what is saved "
    "is gone on with by the same command"
)

RunOption = Annotated[Path, typer.Option("--out", help="the run's folder")]


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


app.command()(run)
app.command()(train)


@app.command()
def shrink(out: RunOption) -> None:
    """Write the slim checkpoint from the plan and the tuned weights."""
    one_stage("shrink", out)


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
        say_lines(console, [
            f"{manifest}: every file is what was shipped, and there are no others",
            "This finds damage, not a forger: the manifest is not signed. Compare its own SHA-256 "
            "with the sender's:",
            file_sha256(manifest / MANIFEST),
        ])  # fmt: skip
        console.print_json(json.dumps(provenance))
    elif out is not None and folder is not None:
        verify_folder(out, folder)
    elif out is not None:
        one_stage("verify", out)


app.command()(gate)


@app.command()
def report(out: RunOption, require: Require = None) -> None:
    """Write report.html from what the run has so far."""
    from atp_edge.pipeline.require import check_conditions, parse_conditions
    from atp_edge.run.folder import RunFolder

    conditions = parse_conditions(require or ())
    one_stage("report", out)
    console.print(Text(f"report: {out / 'report.html'}"), soft_wrap=True)
    run = RunFolder(out)
    check_conditions(conditions, run.metrics(), run.stale())


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
    # transformers' bars would be written through ours, and into logs.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Read when torch is imported. libgomp's threads spin 300,000 rounds while they wait for each
    # other, on cores that other programs want; fewer cost an idle machine nothing
    # (docs/research/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Large tensors in pages of 2 MB, where the kernel gives them to who asks: what a pass over much
    # text frees and takes again is cleared 4 KB at a time otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.basicConfig(level=logging.WARNING)
    # It misses a kernel of another package for 4 bits on CPUs, and has its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft reads a name that transformers is about to rename; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal cannot show
            stream.reconfigure(errors="replace")
    Console.on_broken_pipe = _go_on_unheard  # type: ignore[method-assign]
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and `&` leave it
            signal.signal(number, _stop)
    sys.unraisablehook = _stop_again
    try:
        app()
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        message = "; ".join(getattr(stopped, "__notes__", ["the same command starts again"]))
        _end(EXIT_SIGNAL + stopped.signal, f"stopped by {name}:", message)
    except SystemExit as ended:
        # Typer's own 1: for an answer that never came, or a pipe that only it wrote to.
        sys.exit(EXIT_USAGE if ended.code == 1 else ended.code)
    except Exception as error:
        if _lacks_memory(error):
            said = " ".join(str(error).split()) or type(error).__name__
            _end(EXIT_USAGE, "error:", f"memory ran out ({said[:_MOST_QUOTED]}): {_LESS_MEMORY}")
        code = next((c for kind, c in EXIT_CODES.items() if isinstance(error, kind)), EXIT_INTERNAL)
        if code == EXIT_INTERNAL:
            traceback.print_exc()
            _end(code, "internal error:", f"please report it with all of this ({_versions()})")
        _end(code, "error:", str(error))


def _lacks_memory(error: BaseException) -> bool:
    """Whether Python, numpy, torch or ONNX Runtime got no memory; the latter two have no class for
    it everywhere."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or said


def _end(code: int, title: str, message: str) -> NoReturn:
    # As text, for in markup a path like x[/y] is a tag.
    shown = Text.assemble((title, "red"), " ", message)
    Console(stderr=True, highlight=False).print(shown, soft_wrap=True)
    sys.exit(code)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """A destructor swallows what is raised in it: where that is a signal's, it is sent again."""
    if isinstance(lost.exc_value, Stopped):
        threading.Timer(_SENT_AGAIN_AFTER_S, os.kill, (os.getpid(), lost.exc_value.signal)).start()
    else:
        sys.__unraisablehook__(lost)


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
