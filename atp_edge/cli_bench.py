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
    out: Annotated[
        Path | None, typer.Option("--out", help="the run's folder; none: the demo model, cut")
    ] = None,
    peers: Annotated[
        list[str] | None, typer.Option(help="also measure this engine: onnxruntime-genai")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 or int4, again for both; with --peers")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Latency and memory of dense and slim ONNX models, in turn, and of other engines."""
    if context.invoked_subcommand is not None:
        return
    if peers:
        _against_peers(out, peers, precision or [], json_file)
        return
    if out is None:
        raise ValueError("bench needs a run to measure: give --out RUN, or --peers ENGINE")
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


def _against_peers(
    out: Path | None, peers: list[str], precisions: list[str], json_file: Path | None
) -> None:
    from atp_bench.peers.table import render

    from atp_edge.progress import Terminal
    from atp_edge.stages import bench_peers

    with Terminal(console) as progress:
        figures = bench_peers(out, peers, precisions, progress)
    for precision, found in figures["precisions"].items():
        console.print(render(precision, found))
    console.print(figures["note"])
    if json_file is not None:
        write_atomically(json_file, json.dumps(figures, indent=2) + "\n")
