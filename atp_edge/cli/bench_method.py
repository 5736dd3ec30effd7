"""`atp-edge bench quality`, `training` and `kernels`: what the method and its kernels are worth."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from atp_edge.cli.written import check_apart, new_file
from atp_edge.run.files import write_atomically, write_json
from atp_edge.run.stopping import saying

if TYPE_CHECKING:  # imported where used, so that --help answers at once
    from atp_bench.quality.cells import Cell
    from atp_bench.quality.results import Result

console = Console(highlight=False, emoji=False)
JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=new_file, help="write the figures here")
]


def quality(
    preset: Annotated[
        Literal["quick", "cpu", "gpu", "little"],
        typer.Option(help="quick: minutes; cpu: hours; gpu: the full matrix; little: by documents"),
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
        Path | None,
        typer.Option(callback=new_file, help="a page of plots, or a document when it ends in .md"),
    ] = None,
) -> None:
    """ATP, its ablations and the two-stage ways at equal tokens; goes on where it was."""
    from atp_bench.quality.cells import matrix
    from atp_bench.quality.report import document, page
    from atp_bench.quality.runner import run_matrix

    from atp_edge.run.progress import Terminal

    files = json_files or [out / "results.json"]
    check_apart({"--json": files[0], "--report": report}, files[1:])
    known = _known(files) if show else {}
    if len(files) > 1 and not show:
        raise ValueError(f"--json {files[1]}: a matrix has one results file; --show reads several")
    cells = [r.cell for r in known.values()] if show else matrix("quick" if quick else preset)
    chosen = _chosen(cells, only)
    if show:
        results = [known[cell.key] for cell in chosen]
    else:
        saved = f"finished cells are in {files[0]}, training in {out}; the same command goes on"
        with saying(lambda: saved), Terminal(console) as progress:
            results = run_matrix(
                chosen,
                work=out,
                results=files[0],
                progress=progress,
                items=items,
                blocks=blocks,
                keep=keep,
            )
    _show(results, all_claims=not only)
    if report is not None:
        markdown = report.suffix == ".md"
        write_atomically(report, document(results) if markdown else page(results))


def _known(files: list[Path]) -> dict[str, Result]:
    from atp_bench.quality.results import read_results

    known = {key: r for file in files for key, r in read_results(file).items()}
    if not known:
        raise ValueError(f"{files[0]}: no results to show; without --show the matrix is run")
    return known


def _chosen(cells: list[Cell], only: list[str] | None) -> list[Cell]:
    chosen = [c for c in cells if not only or any(text in c.key for text in only)]
    if not chosen:
        nearest = difflib.get_close_matches(str(only), [c.key for c in cells], n=3, cutoff=0.0)
        raise ValueError(
            f"no cell matches --only {only}; of {len(cells)} the nearest are {', '.join(nearest)}"
        )
    return chosen


def _show(results: list[Result], *, all_claims: bool) -> None:
    """all_claims: those that nothing was measured of, too, where any was measured."""
    from atp_bench.quality.ablations import ablations, ablations_tables
    from atp_bench.quality.acceptance import acceptance_table, criteria
    from atp_bench.quality.report import tables
    from atp_bench.quality.summary import summarize

    summaries = summarize(results)
    for shown in (*tables(summaries), *ablations_tables(ablations(summaries))):
        console.print(shown)
    claims = criteria(results)
    if measured := [c for c in claims if c.measured]:
        console.print(acceptance_table(claims if all_claims else measured))


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
    run_rounds: Annotated[
        int, typer.Option(min=0, help="rounds of a run's own steps; 0: leave them out")
    ] = 3,
    json_file: JsonFile = None,
) -> None:
    """The LoRA step with a part kept against all kept; no ratio unless every gradient is equal."""
    import torch
    from atp_bench.run_steps import run_steps_table
    from atp_bench.training import bench_training, steps_table

    from atp_edge.training.setup import model_source

    check_apart({"--json": json_file}, [model])
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
        run_rounds=run_rounds,
    )
    for precision_name, rows in figures["rows"].items():
        console.print(steps_table(precision_name, rows, equal=figures["gradients_equal"]))
    if figures["run_steps"]:
        console.print(run_steps_table(figures["run_steps"]))
    for key, value in figures.items():
        if "_ratio_" in key:
            console.print(f"{key} = {value:.3f}" if value is not None else f"{key}: not given")
    if not figures["gradients_equal"]:
        console.print(f"gradients differ: {figures['largest_gradient_error']}", style="red")
    if json_file is not None:
        write_json(json_file, figures)


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
    plot: Annotated[
        Path | None, typer.Option(callback=new_file, help="write the roofline page here")
    ] = None,
) -> None:
    """One masked LoRA layer against peft, addmm, torch.compile and weights sliced beforehand;
    SwiGLU and its mask against Liger's; on a CPU attention against eager and fused."""
    import torch
    from atp_bench.kernels.roofline import roofline
    from atp_bench.kernels.run import KEPT, KernelSettings, bench_kernels
    from atp_bench.kernels.tables import attention_table, lora_table, swiglu_table

    check_apart({"--json": json_file, "--plot": plot})

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
