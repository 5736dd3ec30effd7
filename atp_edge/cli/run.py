"""`atp-edge run` and `train`: the stages of a run, with all its settings as flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from atp_edge.cli.flags import Settings, takes_settings
from atp_edge.cli.shown import Log, Shown, Track
from atp_edge.config import Config
from atp_edge.run.records import STAGES, StageName

if TYPE_CHECKING:
    from atp_edge.data.splits import Splits
    from atp_edge.pipeline.device import Device
    from atp_edge.pipeline.memory_need import Need

console = Console(highlight=False, emoji=False)
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="then upload onnx/ to the Hub, private"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the costs and the memory, then stop")]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="CONDITION",
        help='end with code 4 unless met: "perplexity<untouched", "recovery>=0.9"; repeatable',
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option("--device-memory", help="a GPU of so much (80GB, 8x80GB), not the device at hand"),
]


@takes_settings
def run(
    settings: Settings,
    *,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    require: Require = None,
    push_to: Push = None,
    log: Log = "text",
    track: Track = None,
) -> None:
    """The whole way: train, shrink, export, verify, bench, gate, report. Goes on where it was."""
    from atp_edge.pipeline.require import check_conditions, parse_conditions
    from atp_edge.run.folder import RunFolder

    conditions = parse_conditions(require or ())
    if push_to is not None:
        from atp_edge.run.hub import check_login, check_name

        check_name(push_to)
        check_login()
    call = Call(dry_run=dry_run, device_memory=device_memory, shown=Shown(log=log, track=track))
    metrics = _stages(settings, STAGES, call)
    if metrics is not None:
        check_conditions(conditions, metrics)
        if push_to is not None:
            from atp_edge.pipeline.push import push

            address = push(RunFolder(Path(settings.config.out)), push_to)
            call.shown.pushed(console, address)


@takes_settings
def train(
    settings: Settings,
    *,
    dry_run: DryRun = False,
    device_memory: DeviceMemory = None,
    log: Log = "text",
    track: Track = None,
) -> None:
    """Learn LoRA and the pruning decision together; writes plan.json, dense/ and adapter/."""
    call = Call(dry_run=dry_run, device_memory=device_memory, shown=Shown(log=log, track=track))
    _stages(settings, ("train",), call)


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a command was called, beside the settings of its run."""

    dry_run: bool
    device_memory: str | None
    shown: Shown

    def __post_init__(self) -> None:
        if self.device_memory is not None and not self.dry_run:
            raise ValueError(
                f"--device-memory {self.device_memory} is of a GPU elsewhere, and a run takes the "
                "device at hand; add --dry-run, or leave it out"
            )


def _fitted(settings: Settings, names: tuple[StageName, ...], call: Call) -> Config:
    """The settings to run with, when all that can be known before has been checked and shown."""
    from atp_edge.pipeline.foresee import foresee
    from atp_edge.pipeline.inputs import inputs_of
    from atp_edge.pipeline.time_estimate import time_lines
    from atp_edge.training.setup import model_source, shapes_alone, splits_of

    shown = call.shown
    heard = shown.log != "quiet" or call.dry_run
    alone = call.dry_run and shapes_alone(model_source(settings.config.model))
    foreseen = foresee(
        settings.config, settings.said, names,
        device_memory=call.device_memory, weights=not alone,
    )  # fmt: skip
    config = foreseen.config
    if alone:
        inputs_of(config)  # That the text is there.
        shown.say(
            console, "no weights there: checked on the model's shapes alone, and no text read"
        )
    if foreseen.chosen and heard:
        shown.say(console, foreseen.chosen)
    # What a run would read next, and refuse.
    splits = splits_of(config) if call.dry_run and not alone else None
    if heard or shown.log == "json":
        _show_costs(shown, config, splits, foreseen.needs, foreseen.device)
    foreseen.refuse()
    if heard:
        for warning in foreseen.warnings():
            shown.say(console, warning, "yellow")
    if splits is not None and call.device_memory is None:
        for line in time_lines(config, names, splits, foreseen.device):
            shown.say(console, line)
    return config


def _show_costs(
    shown: Shown, config: Config, splits: Splits | None, needs: list[Need], device: Device
) -> None:
    """Parameters, text (where it was read), memory and disk: as tables, or as one line of JSON."""
    from atp_edge.pipeline.cost_estimate import cost_table, needs_table, text_table

    if shown.log == "json":
        shown.event(console, "needs", device=device.name, parts=[n.to_dict() for n in needs])
        return
    console.print(cost_table(config))
    if splits is not None:
        console.print(text_table(config, splits))
    console.print(needs_table(needs, device))


def _stages(settings: Settings, names: tuple[StageName, ...], call: Call) -> dict[str, Any] | None:
    """The figures of the run; None of a dry run, and on every rank but the first."""
    from atp_edge.pipeline.launch import check_ranks, follow, leading
    from atp_edge.run import ranks
    from atp_edge.run.progress import Terminal

    ranks.join()
    check_ranks(settings.config)
    if not ranks.is_main():
        follow(settings.config, Terminal(Console(quiet=True)))
        return None
    with leading():
        return _lead(settings, names, call)


def _lead(settings: Settings, names: tuple[StageName, ...], call: Call) -> dict[str, Any] | None:
    from atp_edge.pipeline.stages import run_stages
    from atp_edge.pipeline.summary import table
    from atp_edge.pipeline.verdict import TONE_STYLE, verdict_of

    shown = call.shown
    shown.check()
    config = _fitted(settings, names, call)
    if call.dry_run:
        return None
    with shown.progress(console, config) as progress:
        folder = run_stages(config, names, progress)
    metrics = folder.metrics()
    verdict = verdict_of(metrics)
    shown.end(console, metrics, verdict.sentence)
    if not shown.for_people:
        return metrics
    console.print(table(metrics))
    console.print(Text(verdict.sentence, style=TONE_STYLE[verdict.tone]))
    for advice in verdict.advice:
        console.print(Text(advice))
    if "report" in names:
        console.print(Text(f"report: {folder.path / 'report.html'}"), soft_wrap=True)
    return metrics
