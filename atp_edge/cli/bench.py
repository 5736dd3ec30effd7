"""`atp-edge bench`: latency and memory of a run, and one command for every other claim."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from atp_edge.cli.bench_method import JsonFile, console, kernels, quality, training
from atp_edge.cli.export import bench_folders
from atp_edge.cli.given import Commands
from atp_edge.cli.written import check_apart, sources_of
from atp_edge.run.files import write_json

if TYPE_CHECKING:  # imported where used, so that --help answers at once
    from atp_edge.config import Config

bench = typer.Typer(
    cls=Commands, no_args_is_help=False, help="Measure: latency and memory, and more."
)

for command in (quality, training, kernels):
    bench.command()(command)


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
        list[str] | None,
        typer.Option(
            help="with --peers: fp32, int4 or fp16; may be repeated; default fp32 and int4"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="rows decoded together; none: the run's setting, or 1")
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="also one that `export --to` wrote of this run; may be repeated"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Latency and memory of dense and slim ONNX models, in turn, and of other engines."""
    if context.invoked_subcommand is not None:
        return
    if folder and (out is None or peers):
        raise ValueError(f"--folder {folder[0]} goes with --out RUN, and not with --peers")
    if out is not None:
        check_apart({"--json": json_file}, sources_of(out))
    if peers:
        _against_peers(out, batch, peers, precision or [], json_file)
        return
    if precision:
        raise ValueError(
            f"--precision {precision[0]} goes with --peers; without it a run's own export is "
            "measured"
        )
    if out is None:
        raise ValueError("bench needs a run to measure: give --out RUN, or --peers ENGINE")
    if folder:
        figures = bench_folders(out, folder, batch)
        if json_file is not None:
            write_json(json_file, figures)
        return
    from atp_edge.pipeline.stages import run_stage, taken_up
    from atp_edge.pipeline.summary import table
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run = RunFolder(out)
    with Terminal(console) as progress, taken_up(run, progress, source=False) as config:
        run_stage("bench", _with_rows(config, batch), run, progress)
    metrics = run.metrics()
    console.print(table(metrics))
    if json_file is not None:
        write_json(json_file, metrics["bench"])


def _with_rows(config: Config, batch: int | None) -> Config:
    """These settings, with so many rows decoded together where they are given."""
    from atp_edge.settings import with_values

    return config if batch is None else with_values(config, {"bench.batch": batch})


def _against_peers(
    out: Path | None,
    batch: int | None,
    peers: list[str],
    precisions: list[str],
    json_file: Path | None,
) -> None:
    from atp_bench.peers.run import bench_peers
    from atp_bench.peers.table import comparison_table, targets_table

    from atp_edge.config import Config
    from atp_edge.pipeline.stages import measured, taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    with Terminal(console) as progress:
        if out is None:
            config = _with_rows(Config(), batch)
            figures = bench_peers(config, None, peers, precisions, progress)
        else:
            run = RunFolder(out)
            with taken_up(run, progress, source=False) as config, measured("peers", run):
                config = _with_rows(config, batch)
                figures = bench_peers(config, run, peers, precisions, progress)
    for precision, found in figures["precisions"].items():
        console.print(comparison_table(precision, found))
    if any(found["asked"] for found in figures["precisions"].values()):
        console.print(targets_table(figures["precisions"]))
    console.print(Text(figures["note"]))
    if json_file is not None:
        write_json(json_file, figures)


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

    from atp_edge.pipeline.stages import taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run = RunFolder(out)
    check_apart({"--json": json_file}, sources_of(out))
    if include is not None and not lm_eval:
        raise ValueError(f"--include {include} is of lm-eval tasks: name one with --lm-eval NAME")
    outside = []
    if lm_eval:
        from atp_bench.lm_eval_adapter import load_tasks

        outside = load_tasks(lm_eval, include)
    with Terminal(console) as progress, taken_up(run, progress, source=True):
        scores = score_run(run, progress, items=items, outside=outside)
    console.print(table(scores))
    if json_file is not None:
        write_json(json_file, asdict(scores))


@bench.command()
def losses(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    site_blocks: Annotated[int, typer.Option(min=1, help="test blocks for every site")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Where a run's slim model loses: on which tokens, and at which sites."""
    from atp_bench.loss_map import kinds_table, map_losses, sites_table

    from atp_edge.pipeline.stages import taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run = RunFolder(out)
    check_apart({"--json": json_file}, sources_of(out))
    with Terminal(console) as progress, taken_up(run, progress, source=True):
        found = map_losses(run, progress, site_blocks=site_blocks)
    console.print(kinds_table(found))
    console.print(sites_table(found))
    if json_file is not None:
        write_json(json_file, asdict(found))


@bench.command()
def rounding(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    precision: Annotated[
        list[str] | None, typer.Option(help="int4 or int8; may be repeated; default int4")
    ] = None,
    quantizer: Annotated[
        list[str] | None,
        typer.Option(help="nearest, k-quant or gptq; may be repeated; default: all"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """What int8 and int4 cost a run's slim model on its test split, quantizer by quantizer."""
    from atp_bench.rounding import bench_rounding, check_asked

    from atp_edge.pipeline.stages import measured, taken_up
    from atp_edge.pipeline.summary import rounding_table
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    check_asked(precision or [], quantizer or [])
    run = RunFolder(out)
    check_apart({"--json": json_file}, sources_of(out))
    with (
        Terminal(console) as progress,
        taken_up(run, progress, source=True),
        measured("rounding", run),
    ):
        figures = bench_rounding(out, precision or [], quantizer or [], progress)
    console.print(rounding_table(figures))
    if json_file is not None:
        write_json(json_file, figures)
