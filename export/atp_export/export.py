"""A Hugging Face checkpoint -> a folder with its ONNX model and all that consumers read."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from atp_edge.config import Flavour, Precision, Quantizer
from atp_edge.model.checkpoint import build_on_meta
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.storage import BITS, MOST_POSITIONS, Storage, positions_of
from atp_edge.run.files import folder_atomically
from atp_export.adapter import write_adapter
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.decoder import OPERATORS, DecoderWriter
from atp_export.graph.flavour import Rotary
from atp_export.graph.flavour_onnx import PORTABLE_OPSET
from atp_export.graph.matrix import MatrixWriter
from atp_export.manifest import write_manifest
from atp_export.quantization.calibrate import input_grams
from atp_export.weights import CheckpointWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written."""

    flavour: Flavour
    precision: Precision
    onnx_bytes: int
    seconds: float


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    flavour: Flavour = "ort",
    precision: Precision = "fp32",
    quantizer: Quantizer = "nearest",
    calibration: Tensor | None = None,
    max_length: int = MOST_POSITIONS,
    adapters: Mapping[str, Path] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write out/: model.onnx with its data, configuration, tokenizer, genai_config, manifest.

    quantizer: how int4 and int8 weights are rounded (see atp_export.quantization.quantize).
    calibration: token ids [N, T] that gptq reads; it then holds the whole model in memory, in fp32.
    max_length: rows of the rotary tables, the longest context (never above the model's own).
    adapters: peft folders by name, written as NAME.onnx_adapter; with any mapping, an empty one
    too, the model takes LoRA factors at run time (see atp_export.adapter).
    Raises ValueError for checkpoints that are no supported decoder or are not whole, and for a
    quantizer that does not go with the rest.
    """
    began = time.perf_counter()
    _check_quantizer(precision, quantizer, calibration)
    config = AutoConfig.from_pretrained(checkpoint)
    shape = model_shape(config)
    weights = CheckpointWeights(checkpoint)
    positions = positions_of(config, max_length)
    metadata = {"flavour": flavour, "precision": precision} | dict(provenance or {})
    if precision in BITS:
        metadata = {"quantizer": quantizer} | metadata
    rotary = rotary_tables(config, positions)
    storage = Storage(
        flavour=flavour,
        precision=precision,
        rotary=(rotary.cos.shape[0], rotary.cos.shape[1]),
        quantizer=quantizer,
        adapter_rank=None if adapters is None else 0,
    )
    grams = {} if calibration is None else input_grams(checkpoint, calibration)
    with folder_atomically(out) as beside:
        g = GraphBuilder(beside, DTYPES.get(precision, torch.float32))
        matrices = MatrixWriter(g, storage, shape.biased, weights, grams)
        DecoderWriter(g, shape, matrices, rotary).write()
        path = g.finish(opset=_opset(flavour, precision), contrib=storage.fused, metadata=metadata)
        check_model(path)
        for name, peft in (adapters or {}).items():
            write_adapter(peft, beside, beside / f"{name}.onnx_adapter")
        config.save_pretrained(beside)
        if (checkpoint / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(beside)
        (beside / "genai_config.json").write_text(
            json.dumps(genai_config(config, shape, positions, flavour), indent=2) + "\n"
        )
        size = sum(f.stat().st_size for f in beside.glob("model.onnx*"))
        write_manifest(beside, metadata)
    return ExportReport(
        flavour=flavour,
        precision=precision,
        onnx_bytes=size,
        seconds=time.perf_counter() - began,
    )


def _check_quantizer(
    precision: Precision, quantizer: Quantizer, calibration: Tensor | None
) -> None:
    if quantizer not in get_args(Quantizer):
        raise ValueError(f"quantizer {quantizer!r}: expected {', '.join(get_args(Quantizer))}")
    if quantizer != "nearest" and precision not in BITS:
        raise ValueError(
            f"quantizer {quantizer} rounds int8 and int4 weights, not {precision}: export in one "
            "of these precisions, or leave the quantizer at nearest"
        )
    if (quantizer == "gptq") != (calibration is not None):
        raise ValueError(
            f"quantizer {quantizer} with{'out' if calibration is None else ''} calibration: gptq "
            "needs blocks of tokens to calibrate on, and no other quantizer reads any"
        )


def _opset(flavour: Flavour, precision: Precision) -> int:
    if flavour == "portable":
        return PORTABLE_OPSET["quantized" if precision in BITS else "plain"]
    return OPERATORS[flavour].opset


def check_model(path: Path) -> None:
    """onnx.checker on the file with its external data, and the full check (shapes, types) where
    only ai.onnx operators are used: it knows none of com.microsoft's."""
    domains = {opset.domain for opset in onnx.load(path, load_external_data=False).opset_import}
    onnx.checker.check_model(str(path), full_check="com.microsoft" not in domains)


def rotary_tables(config: Any, positions: int) -> Rotary:
    """cos and sin [positions, head_dim / 2] as the model computes them, scaling included."""
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; expected {', '.join(ROPE_TYPES)}")
    plain = copy.copy(config)
    plain.per_layer_config = None
    rotary_class: Any = type(build_on_meta(config).model.rotary_emb)
    rotary = rotary_class(config=plain)
    angles = torch.outer(torch.arange(positions).float(), rotary.inv_freq.float())
    return Rotary(
        cos=angles.cos() * rotary.attention_scaling, sin=angles.sin() * rotary.attention_scaling
    )


def genai_config(
    config: Any, shape: ModelShape, positions: int, flavour: Flavour
) -> dict[str, Any]:
    """onnxruntime-genai's configuration (its runtime reads each layer's cache from the graph)."""
    with_attention = [layer for layer in shape.layers if layer.heads]
    layer = with_attention[0]
    in_place = flavour == "ort"
    inputs = ["input_ids", "attention_mask"] + ["position_ids"] * (not in_place)
    eos = config.eos_token_id
    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "model": {
            "type": shape.family,
            "vocab_size": shape.vocabulary,
            "context_length": positions,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": config.pad_token_id
            if config.pad_token_id is not None
            else (eos[0] if isinstance(eos, list) else eos),
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "head_size": layer.head_dim,
                "hidden_size": shape.hidden,
                "num_attention_heads": layer.heads,
                "num_hidden_layers": len(with_attention),
                "num_key_value_heads": layer.kv_heads,
                "inputs": {name: name for name in inputs} | names,
                "outputs": {"logits": "logits"} | outputs,
            },
        },
        "search": {"max_length": positions, "past_present_share_buffer": in_place},
    }
