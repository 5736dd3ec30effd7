"""onnx/ proven equal to slim/, and onnx-dense/ to dense/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atp_export.runtime import Session, usable_providers
from atp_export.runtime import perplexity as onnx_perplexity
from atp_export.verification.by_layers import verify_by_layers
from atp_export.verification.verify import VerifyReport
from atp_export.verification.verify import verify as verify_onnx
from peft import PeftModel
from torch import nn

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import perplexity, streamed_text_loss
from atp_edge.model.checkpoint import load_narrow, shape_of
from atp_edge.model.loading import load_tokenizer
from atp_edge.pipeline.device import ROOM, free_memory
from atp_edge.pipeline.memory_terms import layers_at_once
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
        judged = judge_of(run.dense, run.onnx_dense, {}, progress)
        dense = proofs_of(run.onnx_dense, judged, tokenizer, prompts, config, {})
        del judged
    progress.say("comparing the slim ONNX model with PyTorch")
    adapters = adapters_of(config, run)
    model = judge_of(run.slim, run.onnx, adapters, progress)
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


def folder_bytes(folder: Path) -> int:
    """Of the files of an exported model."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def require_proven(proofs: Proofs, folder: Path, source: Path) -> None:
    """Raise NotProvenError where one of them is not."""
    for provider, proof in proofs.items():
        if not proof.passed:
            reasons = "; ".join(proof.failures)
            raise NotProvenError(f"{folder} does not equal {source} on {provider}: {reasons}")


@dataclass(frozen=True, kw_only=True)
class ByLayers:
    """A checkpoint that memory does not hold as a proof needs it: so many layers at once."""

    checkpoint: Path
    layers: int
    at_once: int


Judge = nn.Module | ByLayers
"""What a folder is compared with: a whole model in fp32, or some of its layers at a time."""


def judge_of(
    checkpoint: Path, folder: Path, adapters: Mapping[str, Path], progress: Progress
) -> Judge:
    """The model, where memory has room for a proof by it. Raises ValueError where it has none and
    there are adapters, which are proven with a whole model alone."""
    shape, shipped = shape_of(checkpoint), folder_bytes(folder)
    layers, room = len(shape.layers), ROOM * free_memory()
    at_once = layers_at_once(shape, shipped, room)
    if at_once >= layers:
        return load_narrow(checkpoint)
    if adapters:
        raise ValueError(
            f"{checkpoint}: a proof of it and its adapter takes more than the {room / 1e9:.0f} GB "
            "that are free for it here; verify it on a larger machine, or merge the adapter "
            "(--no-export-keep-adapter)"
        )
    progress.say(f"memory holds no proof of the whole: {at_once} of {layers} layers at a time")
    return ByLayers(checkpoint=checkpoint, layers=layers, at_once=at_once)


def proofs_of(
    folder: Path,
    model: Judge,
    tokenizer: Any,
    prompts: Sequence[str],
    config: Config,
    adapters: Mapping[str, Path],
) -> Proofs:
    """By execution provider."""
    how: dict[str, Any] = {
        "new_tokens": VERIFY_NEW_TOKENS,
        "precision": config.export.precision,
    }

    def proof(provider: str) -> VerifyReport:
        if isinstance(model, ByLayers):
            how.update(layers=model.layers, at_once=model.at_once)
            return verify_by_layers(
                folder, model.checkpoint, tokenizer, prompts, provider=provider, **how
            )
        return verify_onnx(
            folder, model, tokenizer, prompts, provider=provider, adapters=adapters, **how
        )

    return {provider: proof(provider) for provider in usable_providers()}


def _figures(proofs: Proofs) -> dict[str, Any]:
    return {provider: asdict(proof) for provider, proof in proofs.items()}


def rounding_cost(
    folder: Path, exact: Judge, blocks: Blocks, adapters: Mapping[str, Path]
) -> dict[str, float]:
    """Perplexity of blocks by the ONNX model, and over the fp32 checkpoint's; both with the adapter
    on where there is one, for so they are used."""
    if isinstance(exact, ByLayers):
        unrounded = streamed_text_loss(exact.checkpoint, blocks).perplexity
        return _cost(Session(folder), blocks, unrounded)
    session, whole = Session(folder), exact
    for name, peft in adapters.items():
        session = Session(folder, adapter=folder / f"{name}.onnx_adapter")
        whole = PeftModel.from_pretrained(whole, peft)
    return _cost(session, blocks, perplexity(whole, blocks))


def _cost(session: Session, blocks: Blocks, unrounded: float) -> dict[str, float]:
    rounded = onnx_perplexity(session, blocks.input_ids.numpy(), blocks.labels.numpy())
    return {
        "onnx_perplexity": rounded,
        "fp32_perplexity": unrounded,
        "ratio": rounded / unrounded,
    }
