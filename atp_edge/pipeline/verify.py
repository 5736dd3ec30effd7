"""onnx/ proven equal to slim/, and onnx-dense/ to dense/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.runtime import Session, usable_providers
from atp_export.runtime import perplexity as onnx_perplexity
from atp_export.verification.verify import VerifyReport
from atp_export.verification.verify import verify as verify_onnx
from peft import PeftModel
from torch import nn

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.loading import load_tokenizer
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import splits_of

VERIFY_PROMPTS = 8
VERIFY_PROMPT_TOKENS = 32
VERIFY_NEW_TOKENS = 64
ADAPTER = "adapter"

Proofs = dict[str, VerifyReport]


def verify(config: Config, run: RunFolder, progress: Progress) -> None:
    """Prove onnx/ equal to slim/, with its adapter on where there is one, and onnx-dense/ to
    dense/. Raises NotProvenError, after the figures are written, when either is not."""
    tokenizer, prompts, test = what_is_read(config, run)
    dense: Proofs = {}
    if run.onnx_dense.exists():  # It is measured against and does not ship.
        progress.say("comparing the dense ONNX model with PyTorch")
        dense = proofs_of(run.onnx_dense, load_narrow(run.dense), tokenizer, prompts, config, {})
    progress.say("comparing the slim ONNX model with PyTorch")
    model = load_narrow(run.slim)
    adapters = adapters_of(config, run)
    slim = proofs_of(run.onnx, model, tokenizer, prompts, config, adapters)
    figures: dict[str, Any] = {
        "providers": _figures(slim),
        "dense": {"providers": _figures(dense)},
    }
    if config.export.precision != "fp32":
        progress.say("measuring what the rounded weights cost on the test split")
        figures["quality"] = rounding_cost(run.onnx, model, test, adapters)
    run.add_metrics("verify", figures)
    require_proven(slim, run.onnx, run.slim)
    require_proven(dense, run.onnx_dense, run.dense)


def what_is_read(config: Config, run: RunFolder) -> tuple[Any, list[str], Blocks]:
    """The slim model's tokenizer, the prompts of a proof, and the test split that they are of."""
    tokenizer = load_tokenizer(run.slim, trust_remote_code=config.trust_remote_code)
    test = splits_of(config).test
    prompts = tokenizer.batch_decode(test.input_ids[:VERIFY_PROMPTS, :VERIFY_PROMPT_TOKENS])
    return tokenizer, prompts, test


def adapters_of(config: Config, run: RunFolder) -> dict[str, Path]:
    """The slim model's LoRA where it was kept apart."""
    return {ADAPTER: run.slim / ADAPTER} if config.export.keep_adapter else {}


def require_proven(proofs: Proofs, folder: Path, source: Path) -> None:
    """Raise NotProvenError where one of them is not."""
    for provider, proof in proofs.items():
        if not proof.passed:
            reasons = "; ".join(proof.failures)
            raise NotProvenError(f"{folder} does not equal {source} on {provider}: {reasons}")


def proofs_of(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    config: Config,
    adapters: Mapping[str, Path],
) -> Proofs:
    """By execution provider."""
    return {
        provider: verify_onnx(
            folder,
            model,
            tokenizer,
            prompts,
            new_tokens=VERIFY_NEW_TOKENS,
            precision=config.export.precision,
            provider=provider,
            adapters=adapters,
        )
        for provider in usable_providers()
    }


def _figures(proofs: Proofs) -> dict[str, Any]:
    return {provider: asdict(proof) for provider, proof in proofs.items()}


def rounding_cost(
    folder: Path, exact: nn.Module, blocks: Blocks, adapters: Mapping[str, Path]
) -> dict[str, float]:
    """Perplexity of blocks by the ONNX model, and over the fp32 checkpoint's; both with the adapter
    on where there is one, for so they are used."""
    session = Session(folder)
    for name, peft in adapters.items():
        session = Session(folder, adapter=folder / f"{name}.onnx_adapter")
        exact = PeftModel.from_pretrained(exact, peft)
    rounded = onnx_perplexity(session, blocks.input_ids.numpy(), blocks.labels.numpy())
    unrounded = perplexity(exact, blocks)
    return {
        "onnx_perplexity": rounded,
        "fp32_perplexity": unrounded,
        "ratio": rounded / unrounded,
    }
