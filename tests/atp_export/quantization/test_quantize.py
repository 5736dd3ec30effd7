"""Quantizers: what they store is what both operator sets read, and what data buys."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.manifest import verify_manifest
from atp_export.quantization.calibrate import input_grams
from atp_export.quantization.gptq import MOST_MOVED
from atp_export.quantization.quantize import QuantizedMatrix, quantize
from atp_export.runtime import Generation, Session
from atp_export.runtime.session import load
from atp_export.verification.verify import verify
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from atp_edge.config import Flavour, Quantizer
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.storage import BLOCK, Bits
from tests.atp_export.test_onnx import PROMPTS, Numbers
from tests.tiny import tiny_model

QUANTIZERS: list[Quantizer] = ["nearest", "k-quant", "gptq"]


def values(blocks: QuantizedMatrix) -> NDArray[np.float64]:
    """The matrix [K, N] that blocks mean."""
    levels = blocks.packed.reshape(len(blocks.packed), -1)
    zeros = blocks.zeros
    if blocks.bits == 4:
        levels = np.stack([levels & 15, levels >> 4], -1).reshape(len(levels), -1)
        if zeros is not None:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(levels), -1)
    count = blocks.scales.shape[1]
    middle = np.full((len(levels), count), 2 ** (blocks.bits - 1))
    offsets = middle if zeros is None else zeros[:, :count].astype(np.int64)
    centred = levels.reshape(len(levels), count, BLOCK).astype(np.int64) - offsets[:, :, None]
    whole = centred * blocks.scales[:, :, None].astype(np.float64)
    return whole.reshape(len(levels), -1).T[: blocks.rows]


def correlated(rows: int, tokens: int = 512) -> Tensor:
    """Inputs [T, K] that vary together and unlike in size, as hidden states do."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(rows, rows, generator=draw) * torch.randn(rows, generator=draw).exp()
    return torch.randn(tokens, rows, generator=draw) @ mix / rows**0.5


def matrix_of(rows: int, columns: int = 24) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / 20


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [96, 77, 31])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_weight_moves_further_than_its_levels_lie_apart(
    quantizer: Quantizer, rows: int, bits: Bits
) -> None:
    matrix = matrix_of(rows)
    blocks = quantize(matrix, bits, quantizer, torch.eye(rows))
    error = np.abs(values(blocks) - matrix.numpy())
    apart = np.repeat(np.abs(blocks.scales.T), BLOCK, 0)[:rows]
    # One step at the end that a symmetric block does not reach, and half a step elsewhere.
    assert (error <= 1.01 * apart).all()
    assert np.median(error / apart) < 0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_of_inputs_that_do_not_correlate_is_rounding_to_the_nearest(bits: Bits) -> None:
    matrix = matrix_of(77)
    plain = values(quantize(matrix, bits))
    np.testing.assert_allclose(
        values(quantize(matrix, bits, "gptq", torch.eye(77))), plain, atol=1e-6
    )
    assert np.abs(plain - matrix.numpy()).max() > 1e-5


def test_gptq_errs_less_on_the_inputs_it_was_given() -> None:
    matrix, x = matrix_of(160), correlated(160)

    def error(quantizer: Quantizer) -> float:
        rounded = torch.from_numpy(values(quantize(matrix, 4, quantizer, x.T @ x))).float()
        return float((x @ (rounded - matrix)).norm() / (x @ matrix).norm())

    assert error("k-quant") < error("nearest")
    assert error("gptq") < 0.8 * error("nearest")


def test_an_output_that_gptq_moves_too_far_is_rounded_to_the_nearest() -> None:
    """Calibration text is shorter here than the matrix is wide: what its inputs do not hold costs
    nothing on it, and the proof would not know such a row for the model's own."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=draw) * (2 * torch.randn(64, generator=draw)).exp()
    matrix = matrix_of(64, columns=64)
    found, nearest = values(quantize(matrix, 4, "gptq", x.T @ x)), values(quantize(matrix, 4))
    moved = np.linalg.norm(found - matrix.numpy(), axis=0) / matrix.norm(dim=0).numpy()
    same = (np.abs(found - nearest) < 1e-6).all(axis=0)
    assert 0 < same.sum() < len(same)
    assert (moved <= MOST_MOVED[4]).all()


def test_columns_are_rounded_apart_from_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = matrix_of(77), correlated(77)
    at_once = values(quantize(matrix, 4, "gptq", x.T @ x))
    monkeypatch.setattr("atp_export.quantization.gptq.COLUMNS", 7)
    np.testing.assert_array_equal(values(quantize(matrix, 4, "gptq", x.T @ x)), at_once)


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs that are not finite"):
        quantize(matrix_of(32), 4, "gptq", torch.full((32, 32), torch.nan))


@pytest.mark.parametrize("tied", [True, False])
def test_grams_are_of_what_each_matrix_reads_and_of_what_the_loss_heeds(
    tmp_path: Path, tied: bool
) -> None:
    model: Any = tiny_model("llama", tied=tied)
    save_narrow(model, None, tmp_path / "slim")
    ids = torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(0))
    grams = input_grams(tmp_path / "slim", ids)
    assert len(grams) == 4 * len(model.model.layers) + (1 if tied else 2)
    of_table = ["lm_head"] if tied else []

    def expected(readers: list[str]) -> Tensor:
        names = ["model.embed_tokens", *readers]
        gram = torch.zeros(())
        for block in ids:
            seen: list[tuple[Tensor, Tensor]] = []
            hook = partial(lambda seen, _, x, y: seen.append((x[0], y)), seen)
            hooks = [model.get_submodule(name).register_forward_hook(hook) for name in names]
            loss = model(block[None], labels=block[None]).loss
            for made in hooks:
                made.remove()
            of_rows, *weighted = torch.autograd.grad(loss, [y for _, y in seen])
            for token in range(len(block)):
                if readers:
                    x = seen[1][0][0, token].detach()
                    weight = sum(g[0, token].square().sum() for g in weighted)
                    gram = gram + weight * torch.outer(x, x)
                if readers == of_table:
                    gram = gram + torch.outer(of_rows[0, token], of_rows[0, token])
        return gram

    for readers in (
        [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"],
        ["model.layers.1.self_attn.o_proj"],
        [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")],
        ["model.layers.0.mlp.down_proj"],
        ["lm_head"],
        of_table,
    ):
        wanted = expected(readers)
        assert wanted.norm() > 0
        torch.testing.assert_close(
            grams[(readers or ["model.embed_tokens"])[0]] / wanted.norm(),
            wanted / wanted.norm(),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flavour", ["ort", "standard", "portable"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("quantizer", ["k-quant", "gptq"])
def test_every_flavour_reads_every_quantizer(
    tmp_path: Path, quantizer: str, precision: str, flavour: str, tied: bool
) -> None:
    """An odd number of blocks (3 and 5), a width that no block divides, tied tables."""
    model = tiny_model("llama", tied=tied, hidden_size=96, intermediate_size=141)
    save_narrow(model, None, tmp_path / "slim")
    options: dict[str, Any] = {"flavour": flavour, "precision": precision, "quantizer": quantizer}
    if quantizer == "gptq":
        options["calibration"] = torch.arange(60).reshape(4, 15)
    export_onnx(tmp_path / "slim", tmp_path / "onnx", **options)
    report = verify(tmp_path / "onnx", model, Numbers(), PROMPTS, new_tokens=4, precision=precision)
    assert report.passed, report.failures
    assert verify_manifest(tmp_path / "onnx")["quantizer"] == quantizer


@pytest.mark.parametrize("hidden", [96, 84])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flavour", ["ort", "standard", "portable"])
@pytest.mark.parametrize(("bits", "quantizer"), itertools.product([4, 8], ["nearest", "k-quant"]))
def test_rows_of_the_embedding_are_the_quantizers(
    tmp_path: Path, bits: Bits, quantizer: Quantizer, flavour: Flavour, tied: bool, hidden: int
) -> None:
    """Bit for bit: whole blocks and not, an odd number of them, an odd vocabulary."""
    model: Any = tiny_model("llama", tied=tied, hidden_size=hidden)
    save_narrow(model, None, tmp_path / "slim")
    folder, precision = tmp_path / "onnx", {4: "int4", 8: "int8"}[bits]
    options: Any = {"flavour": flavour, "precision": precision, "quantizer": quantizer}
    export_onnx(tmp_path / "slim", folder, **options)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.graph.output.append(helper.make_empty_tensor_value_info("embed"))
    session = load(folder / "model.onnx", graph.SerializeToString(), "CPUExecutionProvider")
    tokens = [0, 1, 50, 96]
    feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, 4), np.int64),
            "position_ids": np.arange(4)[None]}  # fmt: skip
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    known = {value.name for value in session.get_inputs()}
    (rows,) = session.run(["embed"], {k: v for k, v in feed.items() if k in known})
    table = model.get_input_embeddings().weight.detach()
    expected = values(quantize(table.T, bits, quantizer)).T[tokens].astype(np.float32)
    np.testing.assert_array_equal(rows[0], expected)
    # ONNX Runtime below 1.27 reads an odd number of 4-bit zero points wrongly.
    if bits == 4 and quantizer == "k-quant":
        assert "GatherBlockQuantized" not in {node.op_type for node in graph.graph.node}


def test_calibration_pays_on_text_like_its_own(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=256)
    save_narrow(model, None, tmp_path / "slim")
    ids = torch.randint(0, 97, (24, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[-4:]).logits.numpy()
    errors = {}
    for quantizer in ("nearest", "gptq"):
        given: Any = {"calibration": ids[:20]} if quantizer == "gptq" else {}
        folder = tmp_path / quantizer
        export_onnx(tmp_path / "slim", folder, precision="int4", quantizer=quantizer, **given)
        logits = Generation(Session(folder), 4, 32).step(ids[-4:].numpy())
        errors[quantizer] = float(np.sqrt(np.mean((logits - expected) ** 2)))
    assert errors["gptq"] < 0.95 * errors["nearest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "gptq", "precision": "int4"}, "gptq without calibration"),
        ({"precision": "int4", "calibration": torch.ones(1, 4)}, "nearest with calibration"),
        ({"quantizer": "k-quant"}, "rounds int8 and int4 weights, not fp32"),
        ({"quantizer": "awq", "precision": "int4"}, "quantizer 'awq': expected nearest, k-quant"),
        (
            {"quantizer": "gptq", "precision": "int4", "calibration": torch.ones(0, 4)},
            "no block to calibrate on",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    save_narrow(tiny_model("llama"), None, tmp_path / "slim")
    with pytest.raises(ValueError, match=message):
        export_onnx(tmp_path / "slim", tmp_path / "onnx", **options)
