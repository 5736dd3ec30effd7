"""`atp-edge bench`: latency and memory of a run, and one command for every other claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from atp_edge.files import write_atomically

console = Console(highlight=False)
bench = typer.Typer(no_args_is_help=False, help="Measure: latency and memory, and more.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="write the figures here")]


@bench.callback(invoke_without_command=True)
def latency(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="the run's folder")] = None,
    json_file: JsonFile = None,
) -> None:
    """Latency and memory of a run's dense and slim ONNX models, in turn."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise ValueError("bench needs a run to measure: give --out RUN")
    from atp_edge.progress import Terminal
    from atp_edge.run_folder import RunFolder
    from atp_edge.stages import STAGES
    from atp_edge.summary import table

    run = RunFolder(out)
    config = run.config()
    with Terminal(console) as progress:
        STAGES["bench"](config, run, progress)
    metrics = run.metrics()
    console.print(table(metrics))
    if json_file is not None:
        write_atomically(json_file, json.dumps(metrics["bench"], indent=2) + "\n")
