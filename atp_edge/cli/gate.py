"""`atp-edge gate`: ship or do not ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.cli.wrapped import say_lines
from atp_edge.cli.written import check_apart, new_file, sources_of
from atp_edge.run.errors import ConditionNotMetError

if TYPE_CHECKING:
    from atp_edge.gate.results import GateReport

console = Console(highlight=False, emoji=False)


def gate(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML of thresholds; none: the run's")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="default, clinical or legal")] = None,
    form: Annotated[str | None, typer.Option(help="what ships: onnx or slim")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="judge this folder of `export --to`; the run stays as it is")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="further text; may be repeated")] = None,
    slice_by: Annotated[str | None, typer.Option(help="the rows' field that names a slice")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="JSONL of prompts that must pass, or never")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="JSONL of counterfactual pairs: a, b, attribute")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="also write gate.json here")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(callback=new_file, help="also write JUnit XML here")
    ] = None,
) -> None:
    """Ship or do not ship: what ships against the dense tuned model. Exits with 4 if not."""
    named: dict[str, object] = {
        "profile": profile,
        "form": form,
        "data": data,
        "slice_by": slice_by,
        "prompts.files": prompts,
        "bias.files": pairs,
    }
    values = {name: value for name, value in named.items() if value}
    if folder and form == "slim":
        raise ValueError(f"--folder {folder} is judged as onnx; leave --form slim out")
    written = {"--json": json_file, "--junit": junit}
    check_apart(written, sources_of(out))
    report = _judged(out, config_file, values, folder, written)
    _say(report, json_file, junit)


def _judged(
    out: Path,
    config_file: Path | None,
    values: dict[str, object],
    folder: Path | None,
    written: dict[str, Path | None],
) -> GateReport:
    """The gate on the run, whose report is written anew, or on a folder of `export --to`."""
    from atp_edge.gate.settings import profile_named
    from atp_edge.pipeline.exported import settings_of_exported
    from atp_edge.pipeline.gate import files_of, judged_folder, judged_run, settings_of_run
    from atp_edge.pipeline.stages import run_stage, taken_up
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    run, reports = RunFolder(out), []
    with Terminal(console) as progress, taken_up(run, progress, source=True) as config:
        if config_file:
            own = profile_named(config_file) or config.gate.profile
            chosen = replace(config.gate, config=str(config_file), profile=own)
            config = replace(config, gate=chosen)
        settings = settings_of_run(config, values)
        check_apart(written, [*files_of(settings), config.gate.config])
        for path in filter(None, written.values()):  # They say nothing of what is judged now.
            path.unlink(missing_ok=True)
        if folder:
            settings = replace(settings, form="onnx")
            exported = settings_of_exported(config, run, folder)
            return judged_folder(exported, run, progress, settings, folder)
        run_stage(
            "gate", config, run, progress,
            stage=lambda c, r, p: reports.append(judged_run(c, r, p, settings)),
        )  # fmt: skip
        run_stage("report", config, run, progress)
    return reports[0]


def _say(report: GateReport, json_file: Path | None, junit: Path | None) -> None:
    """Show the report, write it where asked. Raises ConditionNotMetError where it did not pass."""
    from atp_edge.gate.outputs import table, write_junit
    from atp_edge.run.files import write_json

    console.print(table(report))
    if report.changed:
        say_lines(console, [f"changed of the profile (its own): {'; '.join(report.changed)}"])
    say_lines(console, report.reasons)
    console.print(Text(f"gate: {report.verdict}"))
    if json_file:
        write_json(json_file, report.to_dict())
    if junit:
        write_junit(report, junit)
    if report.verdict != "passed":
        raise ConditionNotMetError(f"the gate's verdict is {report.verdict}; its reasons are above")
