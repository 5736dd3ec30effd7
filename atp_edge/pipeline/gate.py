"""Stage 6: ship or do not ship; gate.json, gate.xml and the verdict among the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.runtime.domain import PROFILE, DomainProfile, write_profile

from atp_edge.config import Config
from atp_edge.gate.judge import judge
from atp_edge.gate.outputs import write_outputs
from atp_edge.gate.results import GateReport
from atp_edge.gate.settings import Form, GateSettings, read_gate_settings
from atp_edge.model.checkpoint import shape_of
from atp_edge.model.loading import stored_type
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.device import device_of
from atp_edge.pipeline.fit import done_here, holds, short_of
from atp_edge.pipeline.memory_after import gate_part
from atp_edge.run.files import file_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256, value_sha256
from atp_edge.run.progress import Progress


def gate(config: Config, run: RunFolder, progress: Progress) -> None:
    """The gate with the thresholds that the run's settings name. Its verdict is no error here."""
    judged_run(config, run, progress, settings_of_run(config))


def judged_run(
    config: Config, run: RunFolder, progress: Progress, settings: GateSettings
) -> GateReport:
    """The gate with these thresholds, written into the run's folder."""
    report, profile = _judge(config, run, progress, settings)
    run.void("gate")
    with file_atomically(run.path / PROFILE) as beside:
        write_profile(profile, beside)
    write_outputs(report, run.path)
    counts = {
        status: sum(check.status == status for check in report.checks)
        for status in ("passed", "failed", "undecided")
    }
    content = report.to_dict()
    run.add_metrics(
        "gate",
        {
            "verdict": report.verdict,
            "passed": report.verdict == "passed",
            "reasons": list(report.reasons),
            "counts": counts,
            "profile": report.profile,
            "form": report.form,
            "changed": list(report.changed),
            "checks": content["checks"],
            "flips": content["flips"],
            "figures": content["figures"],
            "seconds": report.seconds,
        },
    )
    return report


def judged_folder(
    config: Config, run: RunFolder, progress: Progress, settings: GateSettings, folder: Path
) -> GateReport:
    """The gate on a folder that `export --to` wrote of the run; nothing is written.

    config: as the folder was written (`exported.settings_of_exported`).
    """
    return _judge(config, run, progress, settings, folder)[0]


def _judge(
    config: Config,
    run: RunFolder,
    progress: Progress,
    settings: GateSettings,
    exported: Path | None = None,
) -> tuple[GateReport, DomainProfile]:
    run.require("dense", settings.form)
    as_stored = _short_of_fp32(run, settings.form, exported or run.path / settings.form)
    if as_stored:
        progress.say("memory does not hold the dense model in fp32: it is held as it is stored")
    report, profile = judge(run, config, settings, progress.say, exported, as_stored=as_stored)
    for note in report.notes:
        progress.say(note)
    return report, profile


def _short_of_fp32(run: RunFolder, form: Form, folder: Path) -> bool:
    """Whether the device holds what the gate does only with the dense model as it is stored.

    Raises ValueError where it does not hold that, before a model is read.
    """
    device = device_of(None, run.path)
    asked = gate_part(shape_of(run.dense), stored_type(run.dense), _held(form, folder))
    need = done_here(device, asked)
    if not holds(device, need):
        raise ValueError(
            f"{short_of(need, device)}, for it holds the dense model beside {folder}; run "
            f"{run.command('gate')} on a larger machine; {run.command('report')} writes the page "
            "without it"
        )
    return need is not asked


def _held(form: Form, folder: Path) -> float:
    """Bytes of what ships, as the gate holds it: slim/ in fp32, another form as its files are."""
    if form == "slim":
        return 4.0 * count_parameters(shape_of(folder)).whole
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def settings_of_run(config: Config, values: Mapping[str, Any] | None = None) -> GateSettings:
    """The thresholds of a run: its profile, its file, and values over both."""
    file = Path(config.gate.config) if config.gate.config else None
    own = {} if config.gate.profile == "default" else {"profile": config.gate.profile}
    return read_gate_settings(file, own | dict(values or {}))


def digest(config: Config) -> str:
    """SHA-256 of the thresholds that the run's settings name, and of the files that these name."""
    settings = settings_of_run(config)
    held = [files_sha256(Path(name).parent, [Path(name).name]) for name in files_of(settings)]
    return value_sha256({"settings": asdict(settings), "files": held})


def files_of(settings: GateSettings) -> tuple[str, ...]:
    """The files and folders that thresholds name."""
    one_each = (settings.refusals.phrases, settings.tasks.include)
    return (*settings.data, *settings.bias.files, *settings.prompts.files, *filter(None, one_each))
