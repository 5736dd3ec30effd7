"""The stages of a run: each reads the run's folder and adds to it; each can be run again alone."""

from __future__ import annotations

import importlib.metadata
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from atp_bench.latency import bench_onnx
from atp_bench.peers.compare import Models, check_asked, compare, demo_models
from atp_export.checkpoint import load_narrow, save_narrow
from atp_export.graph import export_onnx
from atp_export.graph.export import BITS
from atp_export.narrow import merge
from atp_export.quantize import Quantizer
from atp_export.runtime import Session, usable_cores, usable_providers
from atp_export.runtime import perplexity as onnx_perplexity
from atp_export.verify import verify as verify_onnx
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from atp_edge.config import Config, ExportConfig
from atp_edge.data import Blocks, Splits
from atp_edge.domains import demo_model_folder
from atp_edge.errors import NotProvenError
from atp_edge.evaluate import perplexity
from atp_edge.families import ModelShape, model_shape
from atp_edge.inputs import model_source, splits_of
from atp_edge.plan import shares
from atp_edge.progress import Progress
from atp_edge.report import write_report
from atp_edge.run_folder import RunFolder
from atp_edge.structures import count_parameters
from atp_edge.train_stage import load_tuned, train

VERIFY_PROMPTS = 20
VERIFY_PROMPT_TOKENS = 32
VERIFY_NEW_TOKENS = 64
CALIBRATION_BLOCKS = 32
PROVENANCE_VERSIONS = ("atp-edge", "torch", "transformers", "onnx")
# What other engines are measured with: 128 + 128 tokens, and 40 % of the decoder removed.
PEERS_TOKENS = 128
PEERS_SHARE = 0.6
PEERS_PRECISIONS = ("fp32", "int4")


def shrink(config: Config, run: RunFolder, progress: Progress) -> None:
    """plan.json and the tuned weights -> slim/, a Hugging Face checkpoint of narrow layers."""
    tokenizer = AutoTokenizer.from_pretrained(run.dense)
    tuned = load_tuned(config, run)
    if config.export.keep_adapter:
        save_narrow(tuned.unload(), tokenizer, run.slim)
        load_tuned(config, run).save_pretrained(run.slim / "adapter")
    else:
        save_narrow(merge(tuned), tokenizer, run.slim)
    progress.say(f"slim model in {run.slim}; measuring it from there")
    dense_shape, slim_shape = _shape(run.dense), _shape(run.slim)
    kept = shares(dense_shape, slim_shape)
    blocks = splits_of(config).test
    run.add_metrics(
        "shrink",
        {
            "dense": _sizes(dense_shape, run.dense),
            "slim": _sizes(slim_shape, run.slim),
            "decoder_share": kept.decoder,
            "whole_share": kept.whole,
            "masked_narrow_max_error": run.metrics()["train"]["masked_narrow_max_error"],
            "perplexity": perplexity(load_narrow(run.slim), blocks),
        },
    )


def _shape(folder: Path) -> ModelShape:
    return model_shape(AutoConfig.from_pretrained(folder))


def _sizes(shape: ModelShape, folder: Path) -> dict[str, int]:
    count = count_parameters(shape)
    return {
        "decoder_parameters": count.decoder,
        "parameters": count.whole,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }


def export(config: Config, run: RunFolder, progress: Progress) -> None:
    """slim/ -> onnx/, and the dense tuned model beside it to be measured against.

    A LoRA that was kept apart becomes onnx/adapter.onnx_adapter.
    """
    settings, keep = config.export, config.export.keep_adapter
    figures: dict[str, object] = {"flavour": settings.flavour, "precision": settings.precision}
    quantizer = quantizer_of(settings)
    calibration = calibration_of(splits_of(config)) if quantizer == "gptq" else None
    for name, source, target in (
        ("dense", run.dense, run.onnx_dense),
        ("slim", run.slim, run.onnx),
    ):
        progress.say(f"writing the {name} model as ONNX")
        began = time.perf_counter()
        export_onnx(
            source,
            target,
            flavour=settings.flavour,
            precision=settings.precision,
            quantizer=quantizer,
            calibration=calibration,
            adapters={"adapter": run.slim / "adapter"} if keep and name == "slim" else None,
            provenance=_provenance(config, run),
        )
        files = target.glob("model.onnx*")
        figures[name] = {
            "onnx_bytes": sum(f.stat().st_size for f in files),
            "seconds": time.perf_counter() - began,
        }
    run.add_metrics("export", figures)


def quantizer_of(settings: ExportConfig) -> Quantizer:
    """The quantizer asked for; of int4's the one that loses least, where int8 loses next to nothing
    by any (`bench rounding`)."""
    if settings.quantizer != "auto":
        return settings.quantizer
    return "gptq" if settings.precision == "int4" else "nearest"


def calibration_of(splits: Splits) -> Tensor:
    """Token ids [N, T] of the train split, for the quantizer that reads them."""
    return splits.train.spread(CALIBRATION_BLOCKS).input_ids


def _provenance(config: Config, run: RunFolder) -> dict[str, str]:
    trained = run.metrics()["train"]
    versions = {name: importlib.metadata.version(name) for name in PROVENANCE_VERSIONS}
    return {
        "source_model": Path(config.model).name,
        "plan_sha256": trained["plan_sha256"],
        "data_sha256": trained["data"]["sha256"],
        "licence": _licence(Path(model_source(config.model))),
        **versions,
    }


def _licence(checkpoint: Path) -> str:
    """The source model's licence as its folder states it: its card's `license:`, or a file."""
    card = checkpoint / "README.md"
    lines = card.read_text().splitlines() if card.exists() else []
    named = (x.partition(":")[2].strip() for x in lines if x.startswith("license:"))
    files = (path.name for path in sorted(checkpoint.glob("LICENSE*")))
    return next(itertools.chain(named, files), "not stated by the source folder")


def verify(config: Config, run: RunFolder, progress: Progress) -> None:
    """Prove onnx/ equal to slim/. Raises NotProvenError when it is not."""
    progress.say(f"comparing ONNX with PyTorch: {VERIFY_PROMPTS} prompts x {VERIFY_NEW_TOKENS}")
    tokenizer = AutoTokenizer.from_pretrained(run.slim)
    test = splits_of(config).test
    prompts = tokenizer.batch_decode(test.input_ids[:VERIFY_PROMPTS, :VERIFY_PROMPT_TOKENS])
    model = load_narrow(run.slim)
    proofs = {
        provider: verify_onnx(
            run.onnx,
            model,
            tokenizer,
            prompts,
            new_tokens=VERIFY_NEW_TOKENS,
            precision=config.export.precision,
            provider=provider,
        )
        for provider in usable_providers()
    }
    figures: dict[str, Any] = {"providers": {k: asdict(v) for k, v in proofs.items()}}
    if config.export.precision != "fp32":
        progress.say("measuring what the rounded weights cost on the test split")
        figures["quality"] = _rounding_cost(run.onnx, model, test)
    run.add_metrics("verify", figures)
    for provider, proof in proofs.items():
        if not proof.passed:
            reasons = "; ".join(proof.failures)
            raise NotProvenError(f"{run.onnx} does not equal {run.slim} on {provider}: {reasons}")


def _rounding_cost(folder: Path, exact: PreTrainedModel, blocks: Blocks) -> dict[str, float]:
    """Perplexity of blocks by the ONNX model, and over the fp32 checkpoint's."""
    rounded = _exported_perplexity(folder, blocks)
    unrounded = perplexity(exact, blocks)
    return {
        "onnx_perplexity": rounded,
        "fp32_perplexity": unrounded,
        "ratio": rounded / unrounded,
    }


def _exported_perplexity(folder: Path, blocks: Blocks) -> float:
    return onnx_perplexity(Session(folder), blocks.input_ids.numpy(), blocks.labels.numpy())


def bench(config: Config, run: RunFolder, progress: Progress) -> None:
    """Latency and memory of the dense and the slim ONNX model, in turn."""
    progress.say("measuring latency and memory, dense and slim in turn")
    settings = config.bench
    report = bench_onnx(
        {"dense": run.onnx_dense, "slim": run.onnx},
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        rounds=settings.rounds,
        threads=settings.threads or None,
    )
    run.add_metrics("bench", report.to_dict())


def bench_peers(
    config: Config,
    run: RunFolder | None,
    peers: Sequence[str],
    precisions: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Dense and slim models against other engines; the demo model and cuts of it without a run.

    A run's figures also go to its metrics. precisions: by default fp32 and int4.
    """
    precisions = precisions or PEERS_PRECISIONS
    check_asked(peers, precisions)
    threads = config.bench.threads or usable_cores()
    with tempfile.TemporaryDirectory() as temporary:
        if run:
            models = _models_of(run)
        else:
            models = demo_models(demo_model_folder(), Path(temporary), PEERS_SHARE, progress.say)
        found = {
            precision: compare(
                models,
                precision,
                peers=peers,
                prompt_tokens=PEERS_TOKENS,
                new_tokens=PEERS_TOKENS,
                batch=config.bench.batch,
                rounds=config.bench.rounds,
                threads=threads,
                say=progress.say,
            )
            for precision in precisions
        }
    figures = {"precisions": found, "note": models.note}
    if run:
        run.add_metrics("peers", figures)
    return figures


def bench_rounding(
    out: Path, precisions: Sequence[str], quantizers: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """What rounding the run's slim model costs on its test split, by precision and quantizer.

    Each is exported, measured and thrown away; the figures go to the run's metrics as well. By
    default int4, by every quantizer.
    """
    for name, asked, known in (("precision", precisions, tuple(BITS)),
                               ("quantizer", quantizers, get_args(Quantizer))):  # fmt: skip
        if not set(asked) <= set(known):
            raise ValueError(f"--{name} {', '.join(asked)}: expected {', '.join(known)}")
    run = RunFolder(out)
    config = run.config()
    run.require("slim")
    splits = splits_of(config)
    blocks, calibration = splits.test, calibration_of(splits)
    found = []
    exact = perplexity(load_narrow(run.slim), blocks)
    pairs: Any = itertools.product(precisions or ["int4"], quantizers or get_args(Quantizer))
    for precision, quantizer in pairs:
        progress.say(f"{precision}, {quantizer}: writing, then {len(blocks.input_ids)} test blocks")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "onnx"
            written = export_onnx(
                run.slim,
                folder,
                flavour=config.export.flavour,
                precision=precision,
                quantizer=quantizer,
                calibration=calibration if quantizer == "gptq" else None,
            )
            rounded = _exported_perplexity(folder, blocks)
        found.append(
            {
                "precision": precision,
                "quantizer": quantizer,
                "onnx_bytes": written.onnx_bytes,
                "onnx_perplexity": rounded,
                "ratio": rounded / exact,
            }
        )
    figures = {"fp32_perplexity": exact, "blocks": len(blocks.input_ids), "rows": found}
    run.add_metrics("rounding", figures)
    return figures


def _models_of(run: RunFolder) -> Models:
    """A run's own dense and slim checkpoints. Raises ValueError for a stage that has not run."""
    run.require("dense", "slim")
    kept = shares(_shape(run.dense), _shape(run.slim)).decoder
    note = f"dense and slim model of {run.path}; slim keeps {kept:.1%} of the decoder's parameters"
    return Models(dense=run.dense, slims={"slim": run.slim}, note=note)


def report(config: Config, run: RunFolder, progress: Progress) -> None:
    """metrics.json, history and plan -> report.html."""
    write_report(run.path)


Stage = Callable[[Config, RunFolder, Progress], None]
STAGES: dict[str, Stage] = {
    "train": train,
    "shrink": shrink,
    "export": export,
    "verify": verify,
    "bench": bench,
    "report": report,
}
# The stage whose work another reads, by that other.
AFTER = {"shrink": "train", "export": "shrink", "verify": "export", "bench": "export"}


def run_stage(name: str, config: Config, run: RunFolder, progress: Progress) -> None:
    """One stage of a run. Raises ValueError when the one whose work it reads has not ended."""
    before = AFTER.get(name)
    if before and before not in run.metrics():
        raise ValueError(
            f"{run.path}: {name} reads what {before} leaves, and {before} has not ended; run "
            f"{run.command(before)}"
        )
    STAGES[name](config, run, progress)
