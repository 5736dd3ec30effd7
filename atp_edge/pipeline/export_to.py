"""A finished run's slim model in another form, as often as one likes: written, proven, measured.

The folder gets its name when all three are done. Nothing of the run is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from atp_export.layouts.transformers_js import check_transformers_js, to_transformers_js
from atp_export.manifest import MANIFEST, unlisted, write_manifest
from atp_export.runtime.domain import PROFILE

from atp_edge.config import Config, Flavour, Precision, Quantizer
from atp_edge.model.loading import load_config
from atp_edge.model.storage import context_of
from atp_edge.pipeline import export_gguf, export_openvino
from atp_edge.pipeline.export import write_onnx
from atp_edge.pipeline.exported import latency, prove, provenance_seal
from atp_edge.pipeline.model_card import write_card
from atp_edge.pipeline.model_card_use import Layout
from atp_edge.pipeline.preflight import check_export, check_lengths
from atp_edge.run.files import check_place, folder_atomically, write_json
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.run.records import EXPORTED_FIGURES, FOLDERS
from atp_edge.settings import with_values

Writer = Callable[[Path, Progress], dict[str, Any]]
"""Writes a folder, and gives its figures."""
Format = Literal["onnx", "gguf"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to write. None: as the run has it."""

    to: Path
    format: Format = "onnx"
    precision: str | None = None
    flavour: str | None = None
    quantizer: str | None = None
    context: int | None = None
    layout: Layout = "plain"


def export_to(config: Config, run: RunFolder, asked: Asked, progress: Progress) -> dict[str, Any]:
    """Write `asked.to`, proven and measured; returns the figures, which lie in it too.

    Raises ValueError for what does not go together, before anything is written, and NotProvenError,
    with nothing left behind, where the folder does not compute what slim/ does.
    """
    _check_form(asked)
    check_target(run, asked.to)
    run.require("slim")
    write = (
        _gguf_writer(config, run, asked)
        if asked.format == "gguf"
        else _onnx_writer(config, run, asked)
    )
    # Of a link, the folder that it leads to: it may have been put on another disk.
    with folder_atomically(asked.to.resolve()) as beside:
        figures = write(beside, progress)
        if (run.path / PROFILE).is_file():
            shutil.copyfile(run.path / PROFILE, beside / PROFILE)
        write_json(beside / EXPORTED_FIGURES, figures)
        write_manifest(beside, provenance_seal(run, beside))
    return figures


def _check_form(asked: Asked) -> None:
    """Raise ValueError for an unknown format or layout, and for one where the other goes."""
    known = {"format": get_args(Format), "layout": get_args(Layout)}
    for name, other in (("format", "layout"), ("layout", "format")):
        value = getattr(asked, name)
        if value in known[name]:
            continue
        if value in known[other]:
            raise ValueError(f"--{name} {value}: that is a {other}; give it as --{other} {value}")
        raise ValueError(f"--{name} {value}: expected {', '.join(known[name])}")


def check_target(run: RunFolder, to: Path) -> None:
    """Raise ValueError for a folder that holds anything but an export, or that a stage writes, be
    it of another run."""
    here, own = to.resolve(), run.path.resolve()
    others = [path for path in here.parents if RunFolder(path).config_toml.is_file()]
    inside = [here.relative_to(path).parts[0] for path in (*others, own) if path in here.parents]
    if own.is_relative_to(here) or {*inside} & {*FOLDERS, "checkpoint"}:
        raise ValueError(f"--to {to}: the run keeps its own there; name another folder")
    check_place(here, f"--to {to}")
    if not here.exists():
        return
    if not here.is_dir():
        raise ValueError(f"--to {to} is a file; name a folder")
    foreign = unlisted(here) if (here / MANIFEST).exists() else [p.name for p in here.iterdir()]
    if foreign:
        raise ValueError(
            f"--to {to}: {foreign[0]} is there, which no export wrote; name a new folder, or one "
            "that `atp-edge export --to` wrote, which is then replaced"
        )


def _gguf_writer(config: Config, run: RunFolder, asked: Asked) -> Writer:
    for name in ("flavour", "quantizer"):
        if value := getattr(asked, name):
            raise ValueError(f"--{name} {value} is of ONNX; GGUF has --precision alone")
    if asked.layout != "plain":
        raise ValueError(f"--layout {asked.layout} is of ONNX; a GGUF file has none")
    precision, context = asked.precision or export_gguf.DEFAULT, asked.context or 0
    warning = export_gguf.check_asked(config, run, precision, context)

    def write(folder: Path, progress: Progress) -> dict[str, Any]:
        if warning:
            progress.say(warning)
        return export_gguf.write(config, run, folder, asked.to, precision, context, progress)

    return write


def _onnx_writer(config: Config, run: RunFolder, asked: Asked) -> Writer:
    settings = settings_asked(config, asked)
    _check_onnx(settings, run)
    precision = settings.export.precision
    if asked.layout == "transformers.js":
        check_transformers_js(precision)
    if asked.layout == "openvino":
        export_openvino.check_asked(settings)

    def write(folder: Path, progress: Progress) -> dict[str, Any]:
        figures = _onnx(settings, run, folder, asked, progress)
        if asked.layout == "plain":
            return figures
        if asked.layout == "transformers.js":
            to_transformers_js(folder, precision)
        else:
            figures |= export_openvino.write(settings, run, folder, asked.to, figures, progress)
        return figures | {"layout": asked.layout}

    return write


def settings_asked(config: Config, asked: Asked) -> Config:
    """The run's settings with those that were asked for. Raises ValueError for unknown values."""
    known: dict[str, Any] = {"flavour": Flavour, "precision": Precision, "quantizer": Quantizer}
    given = {k: v for k, v in asdict(asked).items() if k in (*known, "context") and v is not None}
    for name, value in given.items():
        if name in known and value not in get_args(known[name]):
            expected = ", ".join(get_args(known[name]))
            raise ValueError(f"--{name} {value}: for ONNX expected {expected}")
    if asked.layout == "openvino" and not asked.flavour:
        given["flavour"] = "portable"  # What its folder is made of.
    if asked.precision and not asked.quantizer:
        given["quantizer"] = "auto"  # The run's own is of its own precision.
    return with_values(config, {f"export.{name}": value for name, value in given.items()})


def _check_onnx(config: Config, run: RunFolder) -> None:
    source = load_config(run.slim)
    check_export(config, source)
    check_lengths(config, source)
    context, block = context_of(source, config.export.context), config.dataset.block_tokens
    if block > context:
        raise ValueError(
            f"--context {context}: a folder is measured on the run's test blocks of {block} "
            f"tokens; take {block} or more"
        )


def _onnx(
    config: Config, run: RunFolder, folder: Path, asked: Asked, progress: Progress
) -> dict[str, Any]:
    """Write, prove and measure; the figures."""
    settings = config.export
    progress.say(f"writing {asked.to}: {settings.flavour}, {settings.precision}")
    warning = write_onnx(config, run, run.slim, folder)
    if warning and asked.layout == "plain":
        progress.say(warning)
    figures: dict[str, Any] = {
        "format": "onnx",
        "flavour": settings.flavour,
        "precision": settings.precision,
        "bytes": sum(f.stat().st_size for f in folder.glob("model.onnx*")),
    }
    figures |= prove(config, run, folder, progress, named=asked.to)
    if "quality" in figures:
        write_card("onnx", config, run, folder, verified=figures, layout=asked.layout)
    if settings.precision == "bf16" or not (run.onnx_dense / "model.onnx").is_file():
        return figures
    progress.say("measuring its latency and memory beside the dense model's")
    measured = latency(config, {"dense": run.onnx_dense, "this": folder})
    return figures | {"bench": measured.to_dict()}
