"""Exported folders that others load and our runtime does not, told from one that holds nothing."""

from __future__ import annotations

from pathlib import Path

READERS = {
    "model.gguf": "a GGUF file, which llama.cpp and Ollama run",
    "openvino_model.xml": "the layout of openvino_genai, whose LLMPipeline runs it",
    "onnx/model*.onnx_data": "the layout of transformers.js, which runs it",
}
"""What a folder of another form or layout holds, and what it is then."""


def no_model_in(folder: Path) -> ValueError:
    """Of a folder without model.onnx: what it is instead, and what to do."""
    for pattern, what in READERS.items():
        if any(folder.glob(pattern)):
            return ValueError(
                f"{folder} holds no model.onnx but {what}; for here, write the plain layout with "
                "`atp-edge export --out RUN --to DIR`"
            )
    if not folder.is_dir():
        is_what = "is a file" if folder.exists() else "is no folder"
        return ValueError(
            f"{folder} {is_what}; expected a run's folder, or one that `atp-edge export --to` wrote"
        )
    return ValueError(
        f"{folder} holds no model.onnx; expected a run that is past its export, or a folder that "
        "`atp-edge export --to` wrote"
    )
