"""`atp-edge bench`: latency and memory of a run, and one command for every other claim."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.run.files import write_atomically, write_json

if TYPE_CHECKING:  # imported where used, so that --help answers at once
    from atp_edge.config import Config

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
        list[str] | None,
        typer.Option(
            help="with --peers: fp32, int4 or fp16; may be repeated; default fp32 and int4"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="rows decoded together; none: the run's setting, or 1")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Latency and memory of dense and slim ONNX models, in turn, and of other engines."""
    if context.invoked_subcommand is not None:
        return
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
def quality(
    preset: Annotated[
        Literal["quick", "cpu", "gpu"],
        typer.Option(help="quick: minutes; cpu: hours; gpu: the full matrix"),
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="the same as --preset quick")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="cells whose name holds this text; may be repeated")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="of every task, at most")] = 50,
    blocks: Annotated[int, typer.Option(min=40, help="of the test split, at most")] = 40,
    keep: Annotated[
        bool, typer.Option("--keep", help="leave the runs: --items and --blocks score them again")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="run nothing: what the results files have, of any preset")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="where the runs lie")] = Path("runs/quality"),
    json_files: Annotated[
        list[Path] | None,
        typer.Option("--json", help="results, and what to go on from; with --show several"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="a page of plots, or a document when it ends in .md")
    ] = None,
) -> None:
    """ATP, its ablations and the two-stage ways at equal tokens; goes on where it was."""
    from atp_bench.quality.ablations import ablations, ablations_tables
    from atp_bench.quality.acceptance import acceptance_table, criteria
    from atp_bench.quality.cells import matrix
    from atp_bench.quality.report import document, page, tables
    from atp_bench.quality.results import read_results
    from atp_bench.quality.runner import run_matrix
    from atp_bench.quality.summary import summarize

    from atp_edge.run.progress import Terminal

    files = json_files or [out / "results.json"]
    if len(files) > 1 and not show:
        raise ValueError(f"--json {files[1]}: a matrix has one results file; --show reads several")
    known = {key: r for file in files for key, r in read_results(file).items()} if show else {}
    if show and not known:
        raise ValueError(f"{files[0]}: no results to show; without --show the matrix is run")
    cells = [r.cell for r in known.values()] if show else matrix("quick" if quick else preset)
    chosen = [c for c in cells if not only or any(text in c.key for text in only)]
    if not chosen:
        nearest = difflib.get_close_matches(str(only), [c.key for c in cells], n=3, cutoff=0.0)
        raise ValueError(
            f"no cell matches --only {only}; of {len(cells)} the nearest are {', '.join(nearest)}"
        )
    if show:
        results = [known[cell.key] for cell in chosen]
    else:
        with Terminal(console) as progress:
            results = run_matrix(
                chosen,
                work=out,
                results=files[0],
                progress=progress,
                items=items,
                blocks=blocks,
                keep=keep,
            )
    summaries = summarize(results)
    for shown in (*tables(summaries), *ablations_tables(ablations(summaries))):
        console.print(shown)
    # --only asks about its own cells: what they say nothing of is not "not measured".
    if made := [c for c in criteria(results) if c.measured or not only]:
        console.print(acceptance_table(made))
    if report is not None:
        markdown = report.suffix == ".md"
        write_atomically(report, document(results) if markdown else page(results))


@bench.command()
def training(
    model: Annotated[str, typer.Option(help="folder or hub id; demo: SmolLM2-135M")] = "demo",
    kept: Annotated[float, typer.Option(help="share of the decoder that stays")] = 0.6,
    tokens: Annotated[int, typer.Option(help="tokens of the batch")] = 512,
    rank: Annotated[int, typer.Option(help="of the LoRA")] = 16,
    rounds: Annotated[int, typer.Option(help="rounds, variants in turn")] = 9,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32 or bf16; may be repeated; the first is the ratios'"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The LoRA step with a part kept against all kept; no ratio unless every gradient is equal."""
    import torch
    from atp_bench.training import bench_training, steps_table

    from atp_edge.training.setup import model_source

    asked = tuple(precision or ("fp32", "bf16"))
    if not set(asked) <= {"fp32", "bf16"}:
        raise ValueError(f"--precision {', '.join(asked)}: expected fp32 or bf16")
    figures = bench_training(
        str(model_source(model)),
        kept=kept,
        tokens=tokens,
        rank=rank,
        rounds=rounds,
        precisions=asked,  # type: ignore[arg-type]
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for precision_name, rows in figures["rows"].items():
        console.print(steps_table(precision_name, rows, equal=figures["gradients_equal"]))
    for key, value in figures.items():
        if "_ratio_" in key:
            console.print(f"{key} = {value:.3f}" if value is not None else f"{key}: not given")
    if not figures["gradients_equal"]:
        console.print(f"gradients differ: {figures['largest_gradient_error']}", style="red")
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
    run.config()
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
    with (
        Terminal(console) as progress,
        taken_up(run, progress, source=True),
        measured("rounding", run),
    ):
        figures = bench_rounding(out, precision or [], quantizer or [], progress)
    console.print(rounding_table(figures))
    if json_file is not None:
        write_json(json_file, figures)


@bench.command()
def kernels(
    shapes: Annotated[
        Literal["small", "7b"] | None, typer.Option(help="of layers; by default 7b on a GPU")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    kept: Annotated[list[float] | None, typer.Option(help="shares; may be repeated")] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="of the model")] = "bf16",
    rounds: Annotated[int, typer.Option(help="rounds, rivals in turn")] = 5,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile too; on a GPU on")
    ] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="write the roofline page here")] = None,
) -> None:
    """One masked LoRA layer against peft, addmm, torch.compile and weights sliced beforehand;
    SwiGLU and its mask against Liger's; on a CPU attention against eager and fused."""
    import torch
    from atp_bench.kernels.roofline import roofline
    from atp_bench.kernels.run import KEPT, KernelSettings, bench_kernels
    from atp_bench.kernels.tables import attention_table, lora_table, swiglu_table

    def keep(figures: dict[str, Any]) -> None:
        if json_file is not None:
            write_json(json_file, figures)

    gpu = torch.cuda.is_available()
    settings = KernelSettings(
        shapes=shapes or ("7b" if gpu else "small"),
        tokens=tuple(tokens or ((2048, 4096, 16384) if gpu else (512,))),
        ranks=tuple(rank or ((8, 16, 64) if gpu else (16,))),
        kept=tuple(kept or KEPT),
        dtype=dtype,
        rounds=rounds,
        device="cuda" if gpu else "cpu",
        compiled=gpu if compiled is None else compiled,
    )
    figures = bench_kernels(settings, progress=console.print, keep=keep)
    for measured in figures["cases"]:
        console.print(lora_table(measured))
    for measured in figures["swiglu"]:
        console.print(swiglu_table(measured))
    for measured in figures["attention"]:
        console.print(attention_table(measured))
    console.print(f"backend {figures['backend']}; GPU figures: {figures['gpu_figures']}")
    if plot is not None:
        write_atomically(plot, roofline(figures))
