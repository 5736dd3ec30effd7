"""`atp-edge export`: the stage of a run, or its slim model in another form with `--to`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.cli.given import one_of
from atp_edge.cli.one_stage import one_stage
from atp_edge.cli.wrapped import say_lines
from atp_edge.config import Flavour, Precision, Quantizer

console = Console(highlight=False, emoji=False)


def export(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    to: Annotated[
        Path | None, typer.Option("--to", help="write it here, proven and measured")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            autocompletion=one_of("onnx", "gguf"),
            help="with --to: onnx (default), gguf",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*get_args(Precision), "f32", "f16", "q8_0", "q4_0"),
            help="with --to: fp32, fp16, bf16, int8, int4; GGUF: f32, f16, q8_0, q4_0",
        ),
    ] = None,
    flavour: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*get_args(Flavour)), help="with --to: ort, standard, portable"
        ),
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*get_args(Quantizer)), help="with --to: nearest, k-quant, gptq"
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="with --to: longest context; 0: the model's own")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of("plain", "transformers.js", "openvino"),
            help="with --to: plain, or as transformers.js or openvino (openvino_genai) load it",
        ),
    ] = None,
) -> None:
    """Write the slim model as ONNX again, or anywhere in another form with --to."""
    asked = {"format": format_, "precision": precision, "flavour": flavour,
             "quantizer": quantizer, "context": context, "layout": layout}  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    if to is None:
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"--{name} {value} goes with --to DIR; the run's own onnx/ is written as its "
                "config.toml says"
            )
        one_stage("export", out)
        return
    _elsewhere(out, to, given)


def _elsewhere(out: Path, to: Path, given: dict[str, Any]) -> None:
    from atp_edge.pipeline.export_to import Asked, export_to
    from atp_edge.pipeline.stages import taken_up
    from atp_edge.pipeline.summary import export_lines
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run, asked = RunFolder(out), Asked(to=to, **given)
    with Terminal(console) as progress, taken_up(run, progress, source=True) as config:
        figures = export_to(config, run, asked, progress)
    console.print(Text(f"{to}:"), soft_wrap=True)
    say_lines(console, export_lines(figures))


def verify_folder(out: Path, folder: Path) -> None:
    """Prove a folder of `export --to` again. Raises NotProvenError where it is not."""
    from atp_edge.pipeline.exported import prove, settings_of_exported
    from atp_edge.pipeline.stages import taken_up
    from atp_edge.pipeline.summary import export_lines
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run = RunFolder(out)
    with Terminal(console) as progress, taken_up(run, progress, source=True) as config:
        figures = prove(settings_of_exported(config, run, folder), run, folder, progress)
    console.print(Text(f"{folder}:"), soft_wrap=True)
    say_lines(console, export_lines(figures))


def bench_folders(out: Path, folders: list[Path], batch: int | None) -> dict[str, Any]:
    """Latency and memory of the run's dense and slim models and of these folders, in turn."""
    from atp_edge.pipeline.exported import latency, settings_of_exported
    from atp_edge.pipeline.stages import taken_up
    from atp_edge.pipeline.summary import export_lines
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal
    from atp_edge.settings import with_values

    run = RunFolder(out)
    with Terminal(console) as progress, taken_up(run, progress, source=False) as config:
        run.require("onnx-dense", "onnx")
        for folder in folders:
            settings_of_exported(config, run, folder)
        config = config if batch is None else with_values(config, {"bench.batch": batch})
        progress.say("measuring latency and memory in turn")
        named = {str(folder): folder for folder in folders}
        measured = latency(config, {"dense": run.onnx_dense, "slim": run.onnx} | named).to_dict()
    say_lines(console, export_lines({"bench": measured}))
    return measured
