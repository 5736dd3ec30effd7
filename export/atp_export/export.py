"""A Hugging Face checkpoint -> a folder with its ONNX model and all that consumers read."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx
import torch
from torch import Tensor

from atp_edge.config import Flavour, Precision, Quantizer
from atp_edge.model.checkpoint import build_on_meta
from atp_edge.model.families import ModelShape, model_shape, rope_settings
from atp_edge.model.loading import load_config
from atp_edge.model.storage import BITS, Storage, context_of
from atp_edge.run.files import folder_atomically
from atp_export.adapter import write_adapter
from atp_export.consumers import describe
from atp_export.graph.builder import GraphBuilder
from atp_export.graph.decoder import OPERATORS, DecoderWriter
from atp_export.graph.flavour import Rotaries, Rotary
from atp_export.graph.flavour_onnx import PORTABLE_OPSET
from atp_export.graph.flavour_ort import check_head_dims
from atp_export.graph.matrix import MatrixWriter
from atp_export.manifest import write_manifest
from atp_export.quantization.calibrate import input_grams
from atp_export.weights import CheckpointWeights

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
WINDOWED_OPSET = 24
RUNTIMES: dict[Flavour, dict[str, str]] = {
    "ort": {"plain": "1.24", "quantized": "1.24"},
    "standard": {"plain": "1.23", "quantized": "1.23"},
    "portable": {"plain": "1.17", "quantized": "1.20"},
}
"""The first ONNX Runtime that computes a flavour's files rightly (`make test-large` tries them)."""


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
    context: int = 0,
    adapters: Mapping[str, Path] | None = None,
    provenance: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Write out/: model.onnx with its data, configuration, tokenizer, genai_config, manifest.

    quantizer: how int4 and int8 weights are rounded (see atp_export.quantization.quantize).
    calibration: token ids [N, T] that gptq reads, layer by layer; what waits lies beside `out`.
    context: tokens at most, prompt and new ones; 0: the model's own context, but 8192 at most.
    adapters: peft folders by name, written as NAME.onnx_adapter; with any mapping, an empty one
    too, the model takes LoRA factors at run time (see atp_export.adapter).
    Raises ValueError for checkpoints that are no supported decoder or are not whole, and for
    settings that do not go together.
    """
    began = time.perf_counter()
    _check_calibration(quantizer, calibration)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    check_exportable(
        config, flavour=flavour, precision=precision, quantizer=quantizer, context=context
    )
    shape = model_shape(config)
    weights = CheckpointWeights(checkpoint)
    positions = context_of(config, context)
    metadata = _metadata(flavour, precision, quantizer) | dict(provenance or {})
    rotary = rotary_tables(config, positions)
    storage = Storage(
        flavour=flavour,
        precision=precision,
        rotary=(positions, shape.rotary_pairs),
        quantizer=quantizer,
        adapter_rank=None if adapters is None else 0,
    )
    with (
        folder_atomically(out) as beside,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.grams-", dir=beside.parent) as scratch,
    ):
        grams = {} if calibration is None else input_grams(checkpoint, calibration, Path(scratch))
        _write_graph(beside, shape, storage, weights, grams, rotary, metadata)
        for name, peft in (adapters or {}).items():
            write_adapter(peft, beside, beside / f"{name}.onnx_adapter")
        describe(
            checkpoint,
            beside,
            config=config,
            shape=shape,
            context=positions,
            in_place=flavour == "ort",
            trust_remote_code=trust_remote_code,
        )
        size = sum(f.stat().st_size for f in beside.glob("model.onnx*"))
        write_manifest(beside, metadata)
    return ExportReport(
        flavour=flavour,
        precision=precision,
        onnx_bytes=size,
        seconds=time.perf_counter() - began,
    )


def _metadata(flavour: Flavour, precision: Precision, quantizer: Quantizer) -> dict[str, str]:
    """What a file says of how it was written."""
    kind = "quantized" if precision in BITS else "plain"
    rounded = {"quantizer": quantizer} if precision in BITS else {}
    return rounded | {
        "flavour": flavour,
        "precision": precision,
        "onnxruntime": f">={RUNTIMES[flavour][kind]}",
    }


def _write_graph(
    folder: Path,
    shape: ModelShape,
    storage: Storage,
    weights: CheckpointWeights,
    grams: Mapping[str, Tensor],
    rotary: Mapping[str, Rotary],
    metadata: dict[str, str],
) -> None:
    """model.onnx with its data, checked."""
    g = GraphBuilder(folder, DTYPES.get(storage.precision, torch.float32))
    matrices = MatrixWriter(g, storage, shape.biased, weights, grams)
    DecoderWriter(g, shape, matrices, rotary).write()
    opset = _opset(storage.flavour, storage.precision, shape)
    check_model(g.finish(opset=opset, contrib=storage.fused, metadata=metadata))


def check_exportable(
    config: Any, *, flavour: Flavour, precision: Precision, quantizer: Quantizer, context: int
) -> None:
    """Raise the ValueError that `export_onnx` would, from a configuration alone."""
    if quantizer not in get_args(Quantizer):
        raise ValueError(f"quantizer {quantizer!r}: expected {', '.join(get_args(Quantizer))}")
    if quantizer != "nearest" and precision not in BITS:
        raise ValueError(
            f"quantizer {quantizer} rounds int8 and int4 weights, not {precision}: export in one "
            "of these precisions, or leave the quantizer at nearest"
        )
    context_of(config, context)
    rotary_tables(config, 1)
    if flavour == "ort":
        check_head_dims(model_shape(config))


def _check_calibration(quantizer: Quantizer, calibration: Tensor | None) -> None:
    if (quantizer == "gptq") != (calibration is not None):
        raise ValueError(
            f"quantizer {quantizer} with{'out' if calibration is None else ''} calibration: gptq "
            "needs blocks of tokens to calibrate on, and no other quantizer reads any"
        )


def _opset(flavour: Flavour, precision: Precision, shape: ModelShape) -> int:
    if flavour == "ort" and any(layer.sliding_window for layer in shape.layers):
        # GroupQueryAttention of ONNX Runtime 1.23 sees another window, without a word: an opset
        # that came after it keeps such a model from being opened there.
        return WINDOWED_OPSET
    if flavour == "portable":
        return PORTABLE_OPSET["quantized" if precision in BITS else "plain"]
    return OPERATORS[flavour].opset


def check_model(path: Path) -> None:
    """onnx.checker on the file with its external data, and the full check (shapes, types) where
    only ai.onnx operators are used: it knows none of com.microsoft's."""
    domains = {opset.domain for opset in onnx.load(path, load_external_data=False).opset_import}
    onnx.checker.check_model(str(path), full_check="com.microsoft" not in domains)


def rotary_tables(config: Any, positions: int) -> Rotaries:
    """The tables [positions, pairs] as the model computes them, scaling included, by the name that
    layers call them by.

    Raises ValueError for a RoPE whose angles depend on the text's length or turn another part of a
    head than the family's.
    """
    shape = model_shape(config)
    settings = rope_settings(config)
    for name in shape.ropes:
        _check_rope_type(settings[name])
    plain = copy.copy(config)
    plain.per_layer_config = None
    rotary_class: Any = type(build_on_meta(config).model.rotary_emb)
    rotary = rotary_class(config=plain)
    at, found = torch.arange(positions)[None], {}
    for name in shape.ropes:
        of_type = {"layer_type": name} if name else {}
        cos, sin = (t[0].float() for t in rotary(torch.zeros(1), at, **of_type))
        if cos.shape[1] != 2 * shape.rotary_pairs:
            raise ValueError(
                f"RoPE turns {cos.shape[1]} of a head's {shape.layers[0].head_dim} dimensions "
                f"(partial_rotary_factor): expected {2 * shape.rotary_pairs}. Use another model"
            )
        found[name] = Rotary(
            cos=cos[:, : shape.rotary_pairs].clone(), sin=sin[:, : shape.rotary_pairs].clone()
        )
    return found


def _check_rope_type(settings: dict[str, Any]) -> None:
    kind = settings["rope_type"]
    # Hunyuan's `dynamic` with an alpha is not dynamic: a base of its own.
    if kind not in ROPE_TYPES and not (kind == "dynamic" and settings.get("alpha")):
        raise ValueError(
            f"rope_type {kind!r} is not supported; expected {', '.join(ROPE_TYPES)}. Use a model "
            "with one of these, or, within the context it was first trained on, without scaling"
        )
