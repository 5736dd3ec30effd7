"""A run's slim model as GGUF: written, proven by llama.cpp where it is at hand, measured."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.manifest import write_manifest

from atp_edge.config import Config
from atp_edge.model.families import model_shape
from atp_edge.model.loading import load_config
from atp_edge.model.storage import context_of
from atp_edge.pipeline.export import provenance
from atp_edge.pipeline.verify import what_is_read
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.setup import source_config, splits_of

DEFAULT = "f16"
PERPLEXITY_BLOCKS = 4


def check_asked(config: Config, run: RunFolder, precision: str, context: int) -> str | None:
    """What llama.cpp will do otherwise without an error, if anything. Raises ValueError for what
    it has no place for."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files are written by the package gguf: pip install 'atp-edge[gguf]'")
    from atp_export.gguf.write import check_gguf

    if config.export.keep_adapter:
        raise ValueError(
            "export.keep_adapter left LoRA apart in slim/adapter, and a GGUF file holds slim/ "
            "alone; train without it"
        )
    try:
        warning = check_gguf(run.slim, precision=precision, context=context)
    except ValueError as error:
        raise ValueError(f"{run.slim} as GGUF: {error}") from error
    longest, block = context_of(load_config(run.slim), context), config.dataset.block_tokens
    if block > longest:
        raise ValueError(
            f"--context {context}: a file is measured on the run's test blocks of {block} tokens; "
            f"take {block} or more"
        )
    return warning


def wants_uniform(config: Config) -> str | None:
    """A sentence on a run whose widths by layer no GGUF file holds, where uniform ones become one.
    None: there is nothing to say."""
    from atp_export.gguf.architecture import architecture_of, is_llama

    source = source_config(config)
    shape = model_shape(source)
    if config.widths == "uniform" or config.decision.space != "groups" or is_llama(shape):
        return None
    try:
        architecture_of(source, shape, context_of(source, config.export.context))
    except ValueError:
        return None
    return (
        f"{shape.family} with widths that differ by layer does not become GGUF (llama.cpp, "
        "Ollama); with --widths uniform it does"
    )


def write(
    config: Config,
    run: RunFolder,
    folder: Path,
    named: Path,
    precision: Any,
    context: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write, prove and measure; the figures. Raises NotProvenError."""
    from atp_export.gguf.llama_cpp import node_folder
    from atp_export.gguf.proof import prove_gguf
    from atp_export.gguf.write import write_gguf

    progress.say(f"writing {named}: GGUF, {precision}")
    calibration = splits_of(config).calibration if precision == "q4_0" else None
    file = write_gguf(
        run.slim, folder, precision=precision, calibration=calibration, context=context,
        name=named.resolve().name,
    )  # fmt: skip
    kind = {"format": "gguf", "precision": precision}
    write_manifest(folder, kind | provenance(config, run))
    tokenizer, prompts, test = what_is_read(config, run)
    node = node_folder()
    by = "llama.cpp and PyTorch" if node else "PyTorch (llama.cpp is not at hand)"
    progress.say(f"comparing it by {by}")
    proof = prove_gguf(
        run.slim, file, precision, tokenizer, prompts=prompts,
        blocks=test.input_ids[:PERPLEXITY_BLOCKS], node=node,
    )  # fmt: skip
    if proof.failures:
        raise NotProvenError(f"{named} does not equal {run.slim}: {'; '.join(proof.failures)}")
    measured = proof.llama_perplexity or proof.torch_perplexity
    return {
        **kind,
        "bytes": file.stat().st_size,
        "proven": _proven(proof),
        "proof": asdict(proof),
        "quality": {
            "perplexity": measured,
            "fp32_perplexity": proof.exact_perplexity,
            "ratio": measured / proof.exact_perplexity,
        },
    }


def _proven(proof: Any) -> str:
    from atp_export.gguf.llama_cpp import HOW

    if proof.release is None:
        return (
            "not proven here: llama.cpp is not at hand. Its tensors are the checkpoint's. To have "
            f"llama.cpp run it: {HOW}"
        )
    others = " (the others part where two are about as good)"
    return (
        f"equal to PyTorch in llama.cpp {proof.release}: same token ids, "
        f"{proof.greedy_same} of {proof.greedy_total} prompts go on with the same greedy tokens"
        f"{others if proof.greedy_same < proof.greedy_total else ''}, {proof.token_ms:.1f} ms a "
        "token on one thread"
    )
