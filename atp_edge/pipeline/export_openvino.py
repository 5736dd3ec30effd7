"""A run's slim model as a folder of openvino_genai: converted from ONNX, and proven by it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.layouts.openvino_genai import (
    check_openvino,
    prove_openvino,
    to_openvino,
    without_onnx,
)

from atp_edge.config import Config
from atp_edge.pipeline.verify import what_is_read
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress

NEW_TOKENS = 64


def check_asked(config: Config) -> None:
    """Raise ValueError for what has no such folder."""
    settings = config.export
    check_openvino(settings.flavour, settings.precision, keep_adapter=settings.keep_adapter)


def write(
    config: Config,
    run: RunFolder,
    folder: Path,
    named: Path,
    figures: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Convert a proven ONNX folder and prove it again; what becomes of its figures.

    Raises NotProvenError.
    """
    progress.say("converting it for openvino_genai, and comparing its greedy tokens")
    model = to_openvino(folder)
    tokenizer, prompts, _ = what_is_read(config, run)
    checks = prove_openvino(
        folder, tokenizer, prompts, precision=config.export.precision, new_tokens=NEW_TOKENS
    )
    if failures := [check.says for check in checks if not check.passed]:
        raise NotProvenError(f"{named} in openvino_genai is not {run.slim}: {'; '.join(failures)}")
    without_onnx(folder)
    release = importlib.metadata.version("openvino-genai")
    return {
        "proven": f"{figures['proven']}; in openvino_genai {release} same token ids, and every "
        "greedy token the file's best or about as good",
        "bytes": sum(model.with_suffix(kind).stat().st_size for kind in (".xml", ".bin")),
        "openvino_genai": [asdict(check) for check in checks],
    }
