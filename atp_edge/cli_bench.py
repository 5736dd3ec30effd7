"""`atp-edge bench`: latency and memory of a run, and one command for every other claim."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

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


@bench.command()
def quality(
    preset: Annotated[
        Literal["quick", "cpu", "gpu"],
        typer.Option(help="quick: minutes; cpu: hours; gpu: the full matrix"),
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="the same as --preset quick")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="cells whose name holds this text; may be repeated")
    ] = None,
    items: Annotated[int, typer.Option(help="of every task")] = 50,
    out: Annotated[Path, typer.Option("--out", help="where the runs lie")] = Path("runs/quality"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="results, and what to go on from")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="write a page of plots here")] = None,
) -> None:
    """ATP, its ablations and the two-stage ways at equal tokens; goes on where it was."""
    from atp_bench.quality.cells import matrix
    from atp_bench.quality.report import page, table
    from atp_bench.quality.results import summarize
    from atp_bench.quality.runner import run_matrix

    from atp_edge.progress import Terminal

    cells = matrix("quick" if quick else preset)
    chosen = [c for c in cells if not only or any(text in c.key for text in only)]
    if not chosen:
        raise ValueError(
            f"no cell matches --only {only}; there are {', '.join(c.key for c in cells)}"
        )
    with Terminal(console) as progress:
        results = run_matrix(
            chosen,
            work=out,
            results=json_file or out / "results.json",
            progress=progress,
            items=items,
        )
    summaries = summarize(results)
    console.print(table(summaries))
    if report is not None:
        write_atomically(report, page(summaries))


@bench.command()
def tasks(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    items: Annotated[int, typer.Option(min=1, help="of every task, at most")] = 100,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="an lm-eval task as well; may be repeated")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="the folder of these tasks' YAML and data")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """A run's dense, slim and ONNX models on the domain's tasks, and on lm-eval's from disk."""
    from atp_bench.tasks import score_run, table

    from atp_edge.progress import Terminal
    from atp_edge.run_folder import RunFolder

    run = RunFolder(out)
    run.config()
    if include is not None and not lm_eval:
        raise ValueError(f"--include {include} is of lm-eval tasks: name one with --lm-eval NAME")
    outside = []
    if lm_eval:
        from atp_bench.lm_eval_adapter import load_tasks

        outside = load_tasks(lm_eval, include)
    with Terminal(console) as progress:
        scores = score_run(run, progress, items=items, outside=outside)
    console.print(table(scores))
    if json_file is not None:
        write_atomically(json_file, json.dumps(asdict(scores), indent=2) + "\n")
