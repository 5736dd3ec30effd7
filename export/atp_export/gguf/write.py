"""A Hugging Face checkpoint -> one GGUF file for llama.cpp, and an Ollama Modelfile beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from atp_edge.model.families import model_shape
from atp_edge.model.loading import load_config
from atp_edge.run.files import folder_atomically
from atp_export.gguf.architecture import architecture_of, write_sizes
from atp_export.gguf.tensors import BLOCK, GgufPrecision, Rounder, stored_tensors
from atp_export.gguf.vocabulary import write_vocabulary
from atp_export.quantization.calibrate import BESIDE, input_grams
from atp_export.quantization.gptq import gptq
from atp_export.weights import CheckpointWeights

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4": LlamaFileType.MOSTLY_Q4_0,
}


def write_gguf(
    checkpoint: Path,
    out: Path,
    *,
    precision: GgufPrecision = "f16",
    calibration: Tensor | None = None,
    context: int | None = None,
) -> Path:
    """Write out/model.gguf and out/Modelfile; returns the path of the former.

    calibration: token ids [N, T] of the train split, for q4: its levels are gptq's, since those to
    the nearest lose the text. context: tokens at most; by default the model's own. Raises
    ValueError for a model, tokenizer or precision that llama.cpp cannot read.
    """
    if precision not in get_args(GgufPrecision):
        raise ValueError(
            f"GGUF precision {precision!r}: expected {', '.join(get_args(GgufPrecision))}"
        )
    if precision == "q4" and calibration is None:
        raise ValueError("GGUF precision q4 rounds by gptq: give blocks of the train split")
    config = load_config(checkpoint)
    shape = model_shape(config)
    named = architecture_of(config, shape)
    weights = CheckpointWeights(checkpoint)
    grams = {} if calibration is None else input_grams(checkpoint, calibration)
    with folder_atomically(out) as beside:
        writer = GGUFWriter(beside / "model.gguf", named.name)
        writer.add_name(out.name)
        writer.add_file_type(FILE_TYPES[precision])
        write_sizes(writer, config, shape, named, context or config.max_position_embeddings)
        write_vocabulary(writer, checkpoint, shape.vocabulary)
        for tensor in stored_tensors(
            weights, shape, named, precision, _gptq_rounder(grams), config.rope_parameters
        ):
            writer.add_tensor(tensor.name, tensor.raw, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (beside / "Modelfile").write_text(modelfile(checkpoint), encoding="utf-8")
    return out / "model.gguf"


def _gptq_rounder(grams: Mapping[str, Tensor]) -> Rounder:
    """4-bit levels by gptq, from the grams of what each matrix reads."""

    def rounded(
        name: str, matrix: Tensor
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        at, _, own = name.rpartition(".")
        gram = grams[f"{at}.{BESIDE.get(own, own)}"]
        levels, scales = gptq(matrix.float().T, gram, bits=4, block=BLOCK)
        return levels.T.numpy(), np.ascontiguousarray(scales.T.numpy()), None

    return rounded


def modelfile(checkpoint: Path) -> str:
    """Ollama's recipe beside the file: where the weights are, and every end token."""
    lines = ["FROM ./model.gguf"]
    generation = checkpoint / "generation_config.json"
    ends = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    for end in ends if isinstance(ends, list) else [ends]:
        if end in names:
            lines.append(f'PARAMETER stop "{names[end]}"')
    return "\n".join(lines) + "\n"
