"""onnxruntime-genai: its own builder's graph on its own runtime (extra `peers`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PRECISIONS = ("fp32", "fp16", "int4")
INSTALL = (
    "install it beside the ONNX Runtime that is there: "
    "pip install --no-deps onnxruntime-genai (its own dependency would install onnxruntime twice)"
)


def _genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ValueError(f"onnxruntime-genai is not installed ({error}): {INSTALL}") from None
    return onnxruntime_genai


def check_precision(precision: str) -> None:
    """Raises ValueError for precisions that the builder does not write for CPUs."""
    if precision not in _PRECISIONS:
        raise ValueError(
            f"onnxruntime-genai's builder writes no {precision} for CPUs; expected one of "
            f"{', '.join(_PRECISIONS)}"
        )


def build(checkpoint: Path, out: Path, precision: str) -> Path:
    """The dense model's ONNX by onnxruntime-genai's builder, for the CPU, with its defaults."""
    check_precision(precision)
    _genai()
    arguments = ["-m", "dense", "-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu",
                 "-c", str(out / "cache")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (out / "model.onnx").is_file():
        raise ValueError(
            f"onnxruntime-genai's builder failed on {checkpoint}:\n{done.stderr[-2000:]}"
        )
    return out


class GenaiEngine:
    """A folder with a genai_config.json on onnxruntime-genai, on the CPU."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        og = _genai()
        config = og.Config(str(folder))
        if threads:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.provider = "CPUExecutionProvider"
        self.model = og.Model(config)
        described = json.loads((folder / "genai_config.json").read_text())
        self.vocabulary: int = described["model"]["vocab_size"]

    def start(self, batch: int, capacity: int) -> _Run:
        return _Run(self.model, batch, capacity)


class _Run:
    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        og = _genai()
        options = og.GeneratorParams(model)
        # min_length: the end token is never chosen, as with us.
        options.set_search_options(
            batch_size=batch, max_length=capacity, min_length=capacity, do_sample=False
        )
        self.generator = og.Generator(model, options)

    def first(self, prompts: NDArray[np.int64]) -> None:
        self.generator.append_tokens(prompts.astype(np.int32))
        self.next()

    def next(self) -> None:
        self.generator.generate_next_token()
        self.generator.get_next_tokens()
