"""slim/ -> onnx/, and the dense tuned model beside it to be measured against."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path

from atp_export.export import export_onnx
from atp_export.manifest import read_manifest, write_manifest

from atp_edge.config import Config
from atp_edge.model.loading import load_config
from atp_edge.model.storage import context_of
from atp_edge.pipeline.inputs import provenance_of
from atp_edge.pipeline.model_card import write_card
from atp_edge.pipeline.source_licence import licence_of
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import model_source, quantizer_of, splits_of

PROVENANCE_VERSIONS = ("atp-edge", "torch", "transformers", "onnx")


def export(config: Config, run: RunFolder, progress: Progress) -> None:
    """slim/ -> onnx/, and the dense tuned model beside it to be measured against.

    A LoRA that was kept apart becomes onnx/adapter.onnx_adapter.
    """
    settings = config.export
    figures: dict[str, object] = {"flavour": settings.flavour, "precision": settings.precision}
    for name, source, target in (
        ("dense", run.dense, run.onnx_dense),
        ("slim", run.slim, run.onnx),
    ):
        progress.say(f"writing the {name} model as ONNX{_of_context(source, settings.context)}")
        began = time.perf_counter()
        warning = write_onnx(config, run, source, target)
        if warning:
            progress.say(warning)
        files = target.glob("model.onnx*")
        figures[name] = {
            "onnx_bytes": sum(f.stat().st_size for f in files),
            "seconds": time.perf_counter() - began,
        }
    run.add_metrics("export", figures)


def write_onnx(config: Config, run: RunFolder, source: Path, target: Path) -> str | None:
    """A checkpoint of the run as ONNX, as `config.export` has it; the slim one with its card.

    Of the slim one, for what text onnxruntime-genai is wrong without an error, if for any.
    """
    settings, quantizer = config.export, quantizer_of(config.export)
    apart = settings.keep_adapter and source == run.slim
    export_onnx(
        source,
        target,
        flavour=settings.flavour,
        precision=settings.precision,
        quantizer=quantizer,
        calibration=splits_of(config).calibration if quantizer == "gptq" else None,
        adapters={"adapter": run.slim / "adapter"} if apart else None,
        provenance=provenance(config, run),
        context=settings.context,
        trust_remote_code=config.trust_remote_code,
    )
    if source != run.slim:
        return None
    warning = write_card("onnx", config, run, target)
    write_manifest(target, read_manifest(target).provenance)
    return warning


def _of_context(checkpoint: Path, asked: int) -> str:
    """What is said of a context that is shorter than the model's own."""
    config = load_config(checkpoint)
    own, shipped = config.max_position_embeddings, context_of(config, asked)
    if shipped == own:
        return ""
    return f" for {shipped:,} tokens of the model's {own:,} (--export-context)"


def provenance(config: Config, run: RunFolder) -> dict[str, str]:
    """What a manifest says of where a model of the run comes from."""
    trained = run.metrics()["train"]
    versions = {name: importlib.metadata.version(name) for name in PROVENANCE_VERSIONS}
    return {
        "source_model": Path(config.model).name,
        "plan_sha256": trained["plan_sha256"],
        "data_sha256": trained["data"]["sha256"],
        **provenance_of(run),
        "licence": licence_of(model_source(config.model)),
        **versions,
    }
