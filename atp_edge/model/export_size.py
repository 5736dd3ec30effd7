"""The size of an exported folder before it is written: what a budget in bytes counts.

The data file is counted tensor by tensor, as it is written (see atp_edge.model.storage). What
model.onnx says around its tensors, and the configurations beside it, are estimates from above, some
tenths of a percent of the whole. Bytes of a site follow from its own width alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from atp_edge.config import Flavour, StructureSpace
from atp_edge.model.families import LayerShape, ModelShape, model_shape
from atp_edge.model.storage import (
    SITE_KINDS,
    Storage,
    Stored,
    around_tensors,
    matrices_of,
    matrix_sizes,
    site_tensors,
)
from atp_edge.model.structures import SiteKind

# Of model.onnx, in bytes, as measured on every family, flavour and precision, and a little more.
_AROUND = 4096
_NODES: dict[Flavour, dict[SiteKind, int]] = {
    "ort": {"attention": 1200, "mlp": 860},
    "standard": {"attention": 1720, "mlp": 860},
    "portable": {"attention": 3650, "mlp": 1280},
}
_QUANTIZED: dict[Flavour, int] = {"ort": 180, "standard": 310, "portable": 310}
_BIAS, _LORA, _HEAD_NORMS, _PAIRS = 150, 900, 1150, 220
_EXTERNAL, _INLINE = 76, 24

# Of genai_config.json, manifest.json and the like; a layer's own sizes in config.json.
_CONFIGURATIONS = 4096
_LAYER, _PAIR = 210, 14
CARD_BYTES = 4096
"""Of the model's card, at most."""


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """How a model ships: its tensors, and the bytes of the files beside it."""

    storage: Storage
    beside: int

    def bytes(self, shape: ModelShape) -> int:
        """The whole folder of a decoder of this shape."""
        return onnx_bytes(shape, self.storage) + self.beside


def onnx_bytes(shape: ModelShape, storage: Storage) -> int:
    """model.onnx with its data and, where one is kept, the adapter."""
    sites = sum(
        site_bytes(shape, storage, layer, kind) for layer in shape.layers for kind in SITE_KINDS
    )
    return around_bytes(shape, storage) + sites


def around_bytes(shape: ModelShape, storage: Storage) -> int:
    """What lies around the layers."""
    before, after = around_tensors(shape, storage)
    return _AROUND + _tensor_bytes([*before, *after])


def site_bytes(shape: ModelShape, storage: Storage, layer: LayerShape, kind: SiteKind) -> int:
    """One site of a layer of these sizes."""
    tensors = list(site_tensors(shape, storage, layer, kind, len(shape.layers)))
    if not tensors:
        return 0
    matrices = matrices_of(shape, kind)
    nodes = _NODES[storage.flavour][kind]
    nodes += len(matrices) * (storage.bits is not None) * _QUANTIZED[storage.flavour]
    nodes += sum(not shape.biased.isdisjoint(names) for names in matrices) * _BIAS
    if kind == "attention" and shape.qk_norm:
        nodes += _HEAD_NORMS
    nodes += _peculiar(shape, storage.flavour, kind)
    if kind == "attention" and layer.rope_pairs is not None:
        columns = _columns(storage, layer.rope_pairs)
        tensors.append(columns)
        nodes += 2 * len(columns.name) + _PAIRS
    return nodes + _tensor_bytes(tensors) + _adapter_bytes(shape, storage, layer, kind)


def _peculiar(shape: ModelShape, flavour: Flavour, kind: SiteKind) -> int:
    """Nodes of what a family has beside Llama, as measured and a little more."""
    layout, portable = shape.layout, flavour == "portable"
    norms = layout.norms
    both = (
        (norms.before_attention, norms.after_attention)
        if kind == "attention"
        else (norms.before_mlp, norms.after_mlp)
    )
    size = 0 if None in both else (650 if portable else 260)
    if layout.norm_offset:
        size += 170 * (4 if kind == "attention" and shape.qk_norm else 2)
    if shape.scales.residual != 1:
        size += 250
    if kind == "mlp":
        size += 950 if portable and shape.activation != "silu" else 0
        return size + (200 if "gate_up_proj" in layout.mlp else 0)
    if shape.scales.attention_cap is not None:
        size += {"ort": 50, "standard": 2100, "portable": 350}[flavour]
    if portable and layout.interleaved:
        size += 1100
    if portable and 2 * shape.rotary_pairs != shape.layers[0].head_dim:
        size += 500
    if layout.head_norms is not None and layout.head_norms.after_rope:
        size += 1150 if portable else 500
    return size


def _tensor_bytes(tensors: Iterable[Stored]) -> int:
    """Tensors in the data file and in model.onnx."""
    return sum(
        len(t.name) + (t.nbytes + _INLINE if t.inline else t.paged_bytes + _EXTERNAL)
        for t in tensors
    )


def _columns(storage: Storage, pairs: tuple[int, ...]) -> Stored:
    """The columns that a layer reads of the rotary tables, a constant that its values name."""
    columns = pairs * (2 if storage.flavour == "portable" else 1)
    return Stored(name=f"const.{list(columns)}", kind="int64", dims=(len(columns),))


def _adapter_bytes(shape: ModelShape, storage: Storage, layer: LayerShape, kind: SiteKind) -> int:
    """LoRA factors of a site: the inputs that take them, and their own file."""
    if storage.adapter_rank is None:
        return 0
    matrices = matrices_of(shape, kind)
    size = _LORA * len(matrices)
    for names, (rows, columns) in zip(matrices, matrix_sizes(shape, layer, kind), strict=True):
        rank = storage.adapter_rank * len(names)
        size += storage.vector("A and B", rank, rows + columns).nbytes
    return size


def files_beside(
    config: Any, tokenizer: PreTrainedTokenizerBase | None, space: StructureSpace
) -> int:
    """What lies in an exported folder beside the model: tokenizer, configurations, manifest,
    and the model's card."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        saved = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    layers = model_shape(config).layers
    pairs = sum(layer.head_dim // 2 for layer in layers) if space == "head-dims" else 0
    return saved + CARD_BYTES + _CONFIGURATIONS + _LAYER * len(layers) + _PAIR * pairs
