"""An exported folder of a run, wherever it lies: what it is, proven and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_bench.engines.latency import BenchReport, bench_onnx
from atp_export.manifest import read_manifest, verify_manifest

from atp_edge.config import Config
from atp_edge.pipeline.verify import (
    adapters_of,
    judge_of,
    proofs_of,
    require_proven,
    rounding_cost,
    what_is_read,
)
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import combined_sha256, files_sha256
from atp_edge.run.progress import Progress
from atp_edge.settings import with_values

SLIM_SHA256 = "slim_sha256"
"""In a manifest: of which slim/ the folder is a form."""


def slim_sha256(run: RunFolder) -> str:
    """One for all files of slim/."""
    return combined_sha256(files_sha256(run.slim, ["."]))


def settings_of_exported(config: Config, run: RunFolder, folder: Path) -> Config:
    """The run's settings with those that a folder of `export --to` was written with.

    Raises ValueError for a folder that is damaged, of another run, the run's own, or no ONNX.
    """
    if folder.resolve() in (run.onnx.resolve(), run.onnx_dense.resolve()):
        raise ValueError(f"{folder} is the run's own: leave --folder out")
    provenance = verify_manifest(folder)
    if provenance.get(SLIM_SHA256) != slim_sha256(run):
        raise ValueError(
            f"{folder} was not written from {run.slim} as it is now; write it again with "
            f"{run.command('export', '--to', str(folder))}"
        )
    if not (folder / "model.onnx").is_file():
        raise ValueError(
            f"{folder} holds no model.onnx; a GGUF file or another layout is proven and measured "
            "as it is written (`atp-edge export --to`)"
        )
    named = {k: v for k, v in provenance.items() if k in ("flavour", "precision", "quantizer")}
    return with_values(config, {f"export.{name}": value for name, value in named.items()})


def prove(
    config: Config, run: RunFolder, folder: Path, progress: Progress, *, named: Path | None = None
) -> dict[str, Any]:
    """A folder's proof against slim/, and its perplexity beside that of slim/.

    named: what messages call it. Raises NotProvenError.
    """
    if config.export.precision == "bf16":
        return {"proven": "not proven here: our runtime feeds no bf16 cache"}
    tokenizer, prompts, test = what_is_read(config, run)
    adapters = adapters_of(config, run)
    model = judge_of(run.slim, folder, adapters, progress)
    progress.say("comparing it with PyTorch")
    proofs = proofs_of(folder, model, tokenizer, prompts, config, adapters)
    require_proven(proofs, named or folder, run.slim)
    progress.say("measuring its perplexity on the test split")
    return {
        "proven": f"equal to PyTorch on {', '.join(proofs)}",
        "providers": {provider: asdict(proof) for provider, proof in proofs.items()},
        "quality": rounding_cost(folder, model, test, adapters),
    }


def latency(config: Config, folders: Mapping[str, Path]) -> BenchReport:
    """Latency and memory of folders in turn, by the run's settings; the reference first."""
    settings = config.bench
    return bench_onnx(
        folders,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        rounds=settings.rounds,
        threads=settings.threads or None,
    )


def provenance_seal(run: RunFolder, folder: Path) -> dict[str, str]:
    """What its manifest says of a folder, and of which slim/ it is."""
    return read_manifest(folder).provenance | {SLIM_SHA256: slim_sha256(run)}
