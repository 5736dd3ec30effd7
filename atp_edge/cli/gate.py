"""`atp-edge gate`: ship or do not ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.run.errors import ConditionNotMetError

console = Console(highlight=False)


def gate(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")],
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML of thresholds; none: the run's")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="default, clinical or legal")] = None,
    form: Annotated[str | None, typer.Option(help="what ships: onnx or slim")] = None,
    data: Annotated[list[str] | None, typer.Option(help="further text; may be repeated")] = None,
    slice_by: Annotated[str | None, typer.Option(help="the rows' field that names a slice")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="JSONL of prompts that must pass, or never")
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(help="JSONL of counterfactual pairs: a, b, attribute")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write gate.json here")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="also write JUnit XML here")] = None,
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
    _gate(out, config_file, values, json_file, junit)


def _gate(
    out: Path,
    config_file: Path | None,
    values: dict[str, object],
    json_file: Path | None,
    junit: Path | None,
) -> None:
    from atp_edge.gate.outputs import table, write_junit
    from atp_edge.gate.results import GateReport
    from atp_edge.pipeline.gate import judged_run, settings_of_run
    from atp_edge.pipeline.stages import run_stage, taken_up
    from atp_edge.run.files import write_json
    from atp_edge.run.folder import RunFolder
    from atp_edge.run.progress import Terminal

    folder, reports = RunFolder(out), list[GateReport]()
    with Terminal(console) as progress, taken_up(folder, progress, source=True) as config:
        if config_file:
            config = replace(config, gate=replace(config.gate, config=str(config_file)))
        settings = settings_of_run(config, values)
        run_stage(
            "gate", config, folder, progress,
            stage=lambda c, r, p: reports.append(judged_run(c, r, p, settings)),
        )  # fmt: skip
        run_stage("report", config, folder, progress)
    report = reports[0]
    console.print(table(report))
    for reason in report.reasons:
        console.print(Text(reason), soft_wrap=True)
    console.print(Text(f"gate: {report.verdict}"))
    if json_file:
        write_json(json_file, report.to_dict())
    if junit:
        write_junit(report, junit)
    _require_passed(folder.metrics())


def _require_passed(metrics: dict[str, Any]) -> None:
    """Raise ConditionNotMetError where the gate did not pass it."""
    verdict = metrics["gate"]["verdict"]
    if verdict != "passed":
        why = "; ".join(metrics["gate"]["reasons"][:3])
        raise ConditionNotMetError(f"the gate's verdict is {verdict}: {why}")
