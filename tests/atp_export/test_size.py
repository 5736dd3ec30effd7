"""The size of an exported folder is known before it is written, and a budget in bytes is met by it.

Decoders of random weights, large enough that what is estimated (model.onnx but for its tensors, the
configurations) is well below a percent.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
import torch
from atp_export.export import export_onnx
from transformers import PreTrainedModel

from atp_edge.config import Flavour, Precision, Quantizer, StructureSpace, WidthsPolicy
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.decision.projection import project
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.export_size import CARD_BYTES, Shipped, files_beside, onnx_bytes
from atp_edge.model.families import LayerShape, ModelShape, model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import narrow_shape, plan_of
from atp_edge.model.storage import Storage, context_of, data_bytes, decoder_tensors
from tests.tiny import FAMILIES, NEW_FAMILIES, tiny_model, to_cut, with_lora

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
# Of a writer's own: constants, masks, tables under second names.
NOT_COUNTED = ("const.", "embed.", "eps.", "mask.", "scale.", "logits_from")


@cache
def dense(tied: bool) -> PreTrainedModel:
    """Half of its parameters in the vocabulary; no width that blocks of 32 divide."""
    return tiny_model(
        "llama-biases", tied=tied, hidden_size=108, intermediate_size=3000, vocab_size=12_000,
        num_hidden_layers=2, head_dim=16,
    )  # fmt: skip


def beside(config: Any, space: StructureSpace) -> int:
    """The files of a folder that no run wrote: it has no card."""
    return files_beside(config, None, space) - CARD_BYTES


def shipped_as(model: PreTrainedModel, **settings: Any) -> Shipped:
    config: Any = model.config
    positions = context_of(config, 0)
    storage = Storage(rotary=(positions, config.head_dim // 2), **settings)
    return Shipped(storage=storage, beside=beside(config, "groups"))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def written(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Dimensions and bytes of the graph's tensors by name."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        size = int(place["length"]) if place else len(tensor.raw_data)
        found[tensor.name] = (tuple(tensor.dims), size)
    return {name: what for name, what in found.items() if not name.startswith(NOT_COUNTED)}


def check_size(folder: Path, shape: ModelShape, shipped: Shipped) -> None:
    """Every tensor and the data file exactly; the rest never less, and at most 10 KB and a tenth of
    model.onnx more."""
    tensors = list(decoder_tensors(shape, shipped.storage))
    found = {name: what for name, what in written(folder).items() if ".lora_" not in name}
    assert found == {t.name: (t.dims, t.nbytes) for t in tensors}
    assert (folder / "model.onnx.data").stat().st_size == data_bytes(tensors)
    size, expected = size_of(folder), shipped.bytes(shape)
    described = (folder / "model.onnx").stat().st_size
    assert size <= expected <= size + 10_000 + 0.1 * described


def decided(feasible: FeasibleDecisions, shape: ModelShape, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    masks = project([torch.randn(s.size, generator=draw) for s in feasible.sites], feasible).masks
    return plan_of(shape, [tuple(m.nonzero().flatten().tolist()) for m in masks])


@pytest.mark.parametrize("widths", get_args(WidthsPolicy))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_budget_in_bytes_is_what_lies_in_the_folder(
    tmp_path: Path, flavour: Flavour, precision: Precision, tied: bool, widths: WidthsPolicy
) -> None:
    model = dense(tied)
    shape = model_shape(model.config)
    shipped = shipped_as(model, flavour=flavour, precision=precision)
    asked = 0.8 * shipped.bytes(shape)
    feasible = feasible_decisions(
        shape,
        parse_budget(f"bytes={asked:.0f}B"),
        widths=widths,
        width_multiple=4,
        shipped=shipped,
    )
    plan = decided(feasible, shape, seed=1)
    slim = narrow_shape(shape, plan)
    assert shipped.bytes(slim) <= asked
    save_narrow(narrow_model(model, plan), None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", flavour=flavour, precision=precision)
    check_size(tmp_path / "onnx", slim, shipped)
    size = size_of(tmp_path / "onnx")
    assert size <= asked
    assert size >= 0.99 * asked or (widths == "uniform" and shipped.bytes(wider(slim)) > asked)


def wider(shape: ModelShape) -> ModelShape:
    """One width step more in every layer."""
    return replace(shape, layers=tuple(replace(x, channels=x.channels + 4) for x in shape.layers))


CASES = [
    *itertools.product(FAMILIES, ["uniform", "per-layer"], ["nearest"]),
    ("llama", "per-layer pairs", "nearest"),
    ("llama", "uniform", "k-quant"),
]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize(("family", "policy", "quantizer"), CASES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_family_weighs_what_was_said(
    tmp_path: Path,
    flavour: Flavour,
    family: str,
    policy: str,
    quantizer: Quantizer,
    precision: Precision,
) -> None:
    if precision == "fp16":
        quantizer = "nearest"
    check_family(tmp_path, flavour, family, policy, quantizer, precision)


@pytest.mark.large
@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("family", NEW_FAMILIES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_other_families_weigh_what_was_said(
    tmp_path: Path, flavour: Flavour, family: str, precision: Precision
) -> None:
    check_family(tmp_path, flavour, family, "per-layer", "nearest", precision)


def check_family(
    tmp_path: Path,
    flavour: Flavour,
    family: str,
    policy: str,
    quantizer: Quantizer,
    precision: Precision,
) -> None:
    model = narrow_model(*to_cut(family, policy))
    tables = (context_of(model.config, 0), model_shape(model.config).rotary_pairs)
    storage = Storage(flavour=flavour, precision=precision, quantizer=quantizer, rotary=tables)
    space: StructureSpace = "head-dims" if "pairs" in policy else "groups"
    shipped = Shipped(storage=storage, beside=beside(model.config, space))
    save_narrow(model, None, tmp_path / "slim")
    settings: dict[str, Any] = {"flavour": flavour, "precision": precision, "quantizer": quantizer}
    export_onnx(tmp_path / "slim", tmp_path / "onnx", **settings)
    check_size(tmp_path / "onnx", model_shape(model.config), shipped)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_adapter_that_ships_is_counted(tmp_path: Path, flavour: Flavour) -> None:
    model = tiny_model("qwen2", num_hidden_layers=12)
    save_narrow(model, None, tmp_path / "slim")
    with_lora(model).save_pretrained(tmp_path / "peft")
    export_onnx(
        tmp_path / "slim", tmp_path / "onnx", flavour=flavour, adapters={"a": tmp_path / "peft"}
    )
    shipped = shipped_as(model, flavour=flavour, precision="fp32", adapter_rank=4)
    check_size(tmp_path / "onnx", model_shape(model.config), shipped)


@pytest.mark.parametrize("quantizer", get_args(Quantizer))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("hidden", "vocabulary"), [(576, 49_152), (2048, 128_256), (896, 151_936)])
def test_a_lower_precision_is_never_larger(
    hidden: int, vocabulary: int, flavour: Flavour, tied: bool, quantizer: Quantizer
) -> None:
    layer = LayerShape(heads=hidden // 64, kv_heads=1, head_dim=64, channels=hidden * 3)
    shape = replace(
        model_shape(tiny_model("llama", tied=tied).config),
        hidden=hidden,
        vocabulary=vocabulary,
        layers=(layer,) * 16,
    )
    sizes = [
        onnx_bytes(shape, Storage(flavour=flavour, precision=precision, quantizer=quantizer,
                                  rotary=(8192, 32)))
        for precision in ("int4", "int8", "fp16", "fp32")
    ]  # fmt: skip
    assert sizes == sorted(sizes)
    # Of the bits of a weight, and a scale (and zero point) a block of 32.
    assert sizes[0] / sizes[3] < 0.18
