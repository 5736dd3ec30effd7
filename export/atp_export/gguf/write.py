"""A Hugging Face checkpoint -> one GGUF file for llama.cpp, and an Ollama Modelfile beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from atp_edge.model.families import model_shape
from atp_edge.model.loading import load_config, load_tokenizer, read_generation
from atp_edge.model.storage import context_of
from atp_edge.run.files import folder_atomically, read_json
from atp_export.consumers import end_tokens
from atp_export.gguf.architecture import architecture_of
from atp_export.gguf.modelfile import modelfile
from atp_export.gguf.places import places_of
from atp_export.gguf.rope import angles_of
from atp_export.gguf.sizes import write_sizes
from atp_export.gguf.tensors import BLOCK, GgufPrecision, Rounder, stored_tensors, tensor_infos
from atp_export.gguf.vocabulary import (
    adds_bos,
    checked_tokenizer,
    other_ids_in_llama_cpp,
    write_vocabulary,
)
from atp_export.quantization.calibrate import BESIDE, input_grams
from atp_export.quantization.gptq import gptq
from atp_export.weights import CheckpointWeights

FILE = "model.gguf"
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}


def check_gguf(checkpoint: Path, *, precision: str, context: int = 0) -> str | None:
    """What llama.cpp will do otherwise without an error, if anything. Raises the ValueError that
    `write_gguf` would, without reading a weight."""
    return other_ids_in_llama_cpp(_checked(checkpoint, precision, context))


def _checked(checkpoint: Path, precision: str, context: int) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    if precision not in get_args(GgufPrecision):
        raise ValueError(
            f"GGUF precision {precision!r}: expected {', '.join(get_args(GgufPrecision))}"
        )
    config = load_config(checkpoint)
    architecture_of(config, model_shape(config), context_of(config, context))
    return checked_tokenizer(checkpoint)


def write_gguf(
    checkpoint: Path,
    out: Path,
    *,
    precision: GgufPrecision = "f16",
    calibration: Tensor | None = None,
    context: int = 0,
    name: str = "",
) -> Path:
    """Write out/model.gguf and out/Modelfile; returns the path of the former.

    calibration: token ids [N, T] of the train split, for q4_0: its levels are gptq's, since those
    to the nearest lose the text. context: tokens at most; 0: the model's own, 8192 at most. name:
    what llama.cpp calls it; else the folder's. Raises ValueError for a model, tokenizer or
    precision that llama.cpp cannot read.
    """
    tokenizer = _checked(checkpoint, precision, context)
    if precision == "q4_0" and calibration is None:
        raise ValueError("GGUF precision q4_0 rounds by gptq: give blocks of the train split")
    config = load_config(checkpoint)
    shape, longest = model_shape(config), context_of(config, context)
    named = architecture_of(config, shape, longest)
    weights = CheckpointWeights(checkpoint)
    grams = {} if calibration is None else input_grams(checkpoint, calibration)
    angles = angles_of(config, shape, named)
    places = places_of(shape, named, angles)
    with folder_atomically(out) as beside:
        writer = GGUFWriter(beside / FILE, named.name)
        writer.add_name(name or out.name)
        writer.add_file_type(FILE_TYPES[precision])
        write_sizes(writer, config, shape, named, longest)
        ends = ends_of(checkpoint)
        write_vocabulary(writer, checkpoint, tokenizer, shape.vocabulary, ends)
        for info in tensor_infos(weights, places, angles, precision):
            writer.add_tensor_info(
                info.name, info.shape, np.dtype(np.float32), info.bytes, raw_dtype=info.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rounder = _gptq_rounder(grams)
        for raw in stored_tensors(weights, places, angles, precision, rounder):
            writer.write_tensor_data(raw)
        writer.close()
        told = modelfile(load_tokenizer(checkpoint), ends, adds_bos=adds_bos(tokenizer))
        (beside / "Modelfile").write_text(told, encoding="utf-8")
    return out / FILE


def ends_of(checkpoint: Path) -> list[int]:
    """Ids of the tokens that end a text."""
    config, own = read_json(checkpoint / "config.json"), load_tokenizer(checkpoint).eos_token_id
    return end_tokens(read_generation(checkpoint), config, own)


def _gptq_rounder(grams: Mapping[str, Tensor]) -> Rounder:
    """4-bit levels by gptq, from the grams of what each matrix reads."""

    def rounded(name: str, matrix: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        at, _, own = name.rpartition(".")
        gram = grams[f"{at}.{BESIDE.get(own, own)}"]
        levels, scales = gptq(matrix.float().T, gram, bits=4, block=BLOCK)
        return levels.T.numpy(), np.ascontiguousarray(scales.T.numpy())

    return rounded
