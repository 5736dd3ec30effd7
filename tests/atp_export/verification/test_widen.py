"""The fp32 form: levels mean what the runtime makes of them, and nothing rounds any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.runtime.session import load
from atp_export.verification.embedding import TABLE, with_table
from atp_export.verification.observe import CPU
from atp_export.verification.places import places_of
from atp_export.verification.tensors import HALVES, Tensors
from atp_export.verification.widen import Widened, widen
from onnx import TensorProto, helper
from torch import nn

from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model

FLAVOURS = ("ort", "standard", "portable")
CASES = [
    (flavour, precision, quantizer)
    for flavour in FLAVOURS
    for precision in ("int8", "int4")
    for quantizer in ("nearest", "k-quant")
]


def widened(folder: Path, model: Any, **options: Any) -> Widened:
    save_narrow(model, None, folder / "slim")
    export_onnx(folder / "slim", folder / "onnx", **options)
    (folder / "wide").mkdir()
    return with_table(widen(folder / "onnx", folder / "wide"), model.config.vocab_size)


def run_alone(folder: Path, node: str, columns: int) -> np.ndarray:
    """What one product of an exported graph makes of unit vectors: its matrix, [in, out]."""
    model = onnx.load(folder / "onnx" / "model.onnx")
    graph = model.graph
    (product,) = (n for n in graph.node if n.name == node)
    x = product.input[0]
    needed, nodes = set(product.input[1:]), [product]
    for other in reversed(graph.node):
        if needed & set(other.output):
            nodes.insert(0, other)
            needed |= set(other.input)
    for attribute in product.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    graph.CopyFrom(
        helper.make_graph(
            nodes,
            "one",
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, [None, columns])],
            [helper.make_empty_tensor_value_info(product.output[0])],
            [tensor for tensor in graph.initializer if tensor.name in needed],
        )
    )
    session = load(folder / "onnx" / "model.onnx", model.SerializeToString(), CPU)
    return session.run(None, {x: np.eye(columns, dtype=np.float32)})[0]


@pytest.mark.parametrize(("flavour", "precision", "quantizer"), CASES)
def test_levels_mean_what_the_runtime_multiplies_by(
    tmp_path: Path, flavour: str, precision: str, quantizer: str
) -> None:
    """Widths that no block divides."""
    model = tiny_model("llama", hidden_size=84, intermediate_size=37)
    form = widened(tmp_path, model, flavour=flavour, precision=precision, quantizer=quantizer)
    own = dict(model.named_parameters())
    tensors, places = Tensors(form.folder, form.graph), places_of(form, own)
    for node, parameter in (
        ("model.layers.1.mlp.down", "model.layers.1.mlp.down_proj.weight"),
        ("lm_head", "lm_head.weight"),
    ):
        place = places[parameter]
        held = np.array(place.of(tensors(place.tensor)))
        ran = run_alone(tmp_path, node, held.shape[1])
        # ONNX Runtime may make int8 activations of what is DequantizeLinear and MatMul here.
        np.testing.assert_allclose(held, ran.T, atol=1e-6 if flavour == "ort" else 1e-2)
        levels = form.quantized[place.tensor]()
        assert set(np.unique(levels.levels)) <= set(range(levels.lowest, levels.highest + 1))
        np.testing.assert_allclose(levels.values()[:, : held.shape[1]], held, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_nothing_is_rounded_any_more(tmp_path: Path, flavour: str, precision: str) -> None:
    model = tiny_model("qwen3", tied=True)
    form = widened(tmp_path, model, flavour=flavour, precision=precision)
    graph = onnx.load(form.folder / "model.onnx", load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    kinds |= {tensor.data_type for tensor in graph.initializer}
    assert not kinds & {*HALVES, TensorProto.INT4, TensorProto.UINT4}
    operators = {node.op_type for node in graph.node}
    assert not operators & {"MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"}
    onnx.checker.check_model(str(form.folder / "model.onnx"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_parameter_has_a_place(tmp_path: Path, flavour: str, tied: bool) -> None:
    """The embedding too, where the graph dequantizes rows that it gathered."""
    model = tiny_model("llama-biases", tied=tied, hidden_size=84)
    form = widened(tmp_path, model, flavour=flavour, precision="int4")
    own = dict(model.named_parameters(remove_duplicate=False))
    places = places_of(form, own)
    assert set(places) == set(own)
    tensors = Tensors(form.folder, form.graph)
    place = places["model.embed_tokens.weight"]
    table = np.array(place.of(tensors(place.tensor)))
    exact = own["model.embed_tokens.weight"].detach().numpy()
    assert 0 < np.abs(table - exact).max() < 0.2 * np.abs(exact).max()
    if flavour != "ort":
        assert place.tensor == TABLE


def test_tied_levels_are_one_tensor_of_the_fp32_form(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True, hidden_size=96)
    form = widened(tmp_path, model, precision="int4")
    places = places_of(form, dict(model.named_parameters(remove_duplicate=False)))
    assert places["lm_head.weight"].tensor == places["model.embed_tokens.weight"].tensor


def test_attributes_that_contradict_the_levels_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", precision="int4")
    path = tmp_path / "onnx" / "model.onnx"
    header = onnx.load(path, load_external_data=False)
    (node,) = (n for n in header.graph.node if n.name == "lm_head")
    for attribute in node.attribute:
        if attribute.name == "N":
            attribute.i += 1
    path.write_bytes(header.SerializeToString())
    (tmp_path / "wide").mkdir()
    with pytest.raises(ValueError, match=r"MatMulNBits says N 98, K 48, 4 bits"):
        widen(tmp_path / "onnx", tmp_path / "wide")


def test_the_model_is_as_it_was_after_a_reference_was_asked(tmp_path: Path) -> None:
    from atp_export.verification.reference import Reference
    from atp_export.verification.stored import stored_in

    model: Any = tiny_model("llama")
    form = widened(tmp_path, model, precision="int4", flavour="portable")
    stored = stored_in(form, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    reference = Reference(model, stored.state, stored.tables, stored.scales)
    assert not torch.allclose(reference(ids).logits, expected, atol=1e-3)
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_reference_in_float64_holds_no_weights_and_answers_as_one_that_does(
    tmp_path: Path, tied: bool, precision: str
) -> None:
    from atp_export.verification.reference import Reference
    from atp_export.verification.stored import stored_in

    model: Any = tiny_model("gemma2", tied=tied)
    form = widened(tmp_path, model, precision=precision)
    stored = stored_in(form, model)
    reference = Reference(model, stored.state, stored.tables, stored.scales)
    # The whole of it in float64, as a model of its own.
    whole: Any = tiny_model("gemma2", tied=tied).double()
    whole.load_state_dict({name: x.double() for name, x in stored.state.items()}, assign=True)
    tables = {name: tuple(x.double() for x in halves) for name, halves in stored.tables.items()}
    expected = Reference(whole, dict(whole.named_parameters(remove_duplicate=False)), tables,
                         stored.scales)  # fmt: skip
    exact, text = reference.double(), [1, 2, 3, 5]
    for _ in range(2):  # What a text took is given up after it, and read again.
        found = exact(torch.tensor([text])).logits
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected(torch.tensor([text])).logits)
        last = torch.from_numpy(exact.logits(text, [3]))
        torch.testing.assert_close(last, found[:, 3])  # in float64, not rounded
        assert all(parameter.is_meta for parameter in exact.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_tensor_that_is_the_models_own_is_held_once(tmp_path: Path) -> None:
    from atp_export.verification.stored import stored_in

    model: Any = tiny_model("llama")
    for precision in ("fp32", "fp16"):
        form = widened(tmp_path / precision, model, precision=precision)
        state = stored_in(form, model).state
        own = dict(model.named_parameters())
        shared = [name for name in own if state[name].data_ptr() == own[name].data_ptr()]
        assert shared == (list(own) if precision == "fp32" else [])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_the_head_shares_with_the_embedding_is_held_once(
    tmp_path: Path, flavour: str, precision: str
) -> None:
    """Where the graph gathers levels and multiplies by another tensor of the same values, too."""
    from atp_export.verification.stored import stored_in

    model: Any = tiny_model("qwen3", tied=True)
    form = widened(tmp_path, model, flavour=flavour, precision=precision)
    state = stored_in(form, model).state
    head, table = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert head.data_ptr() == table.data_ptr()
    assert head.stride() == table.stride()
