"""onnx/ proven equal to slim/."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.runtime import Session, usable_providers
from atp_export.runtime import perplexity as onnx_perplexity
from atp_export.verification.verify import verify as verify_onnx
from transformers import PreTrainedModel

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.loading import load_tokenizer
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import splits_of

VERIFY_PROMPTS = 20
VERIFY_PROMPT_TOKENS = 32
VERIFY_NEW_TOKENS = 64


def verify(config: Config, run: RunFolder, progress: Progress) -> None:
    """Prove onnx/ equal to slim/. Raises NotProvenError when it is not."""
    progress.say(f"comparing ONNX with PyTorch: {VERIFY_PROMPTS} prompts x {VERIFY_NEW_TOKENS}")
    tokenizer = load_tokenizer(run.slim, trust_remote_code=config.trust_remote_code)
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
