"""A proof passes for every family, flavour and precision, and fails for each kind of fault."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.verification import proof
from atp_export.verification.checks import at_most
from atp_export.verification.proof import STEPS, TOGETHER, text_length
from atp_export.verification.verify import VerifyReport, verify
from onnx import numpy_helper
from transformers import PreTrainedModel

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model, narrow_peft
from tests.atp_export.test_onnx import Numbers
from tests.tiny import FAMILIES, per_layer_plan, tiny_model, to_cut, with_lora

FLAVOURS = ("ort", "standard", "portable")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
PROMPTS = ["1 2 3 4 5 6 7", "50 51 52 53"]


def exported(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    save_narrow(model, None, folder / "slim")
    export_onnx(folder / "slim", folder / "onnx", **{"context": 64} | options)
    return folder / "onnx"


def proven(folder: Path, model: Any, precision: str = "fp32", **options: Any) -> VerifyReport:
    return verify(folder, model, Numbers(), PROMPTS, new_tokens=4, precision=precision, **options)


def names(report: VerifyReport) -> set[str]:
    """Of the checks that failed, without the way of reading."""
    return {check.name.split(",")[0] for check in report.checks if not check.passed}


# Every family in every precision, flavours in turn.
CASES = [
    (family, precision, FLAVOURS[i % 3])
    for i, (family, precision) in enumerate(itertools.product(FAMILIES, PRECISIONS))
]


@pytest.mark.parametrize(("family", "precision", "flavour"), CASES)
def test_every_family_is_proven(tmp_path: Path, family: str, precision: str, flavour: str) -> None:
    policy = "per-layer" if family == "qwen3" else "per-layer pairs"
    model = narrow_model(*to_cut(family, policy, tied=family in ("llama", "qwen3")))
    folder = exported(tmp_path, model, flavour=flavour, precision=precision)
    report = proven(folder, model, precision)
    assert report.passed, report.failures
    assert {check.name.split(",")[0] for check in report.checks} == {
        "the graph in fp32", "as shipped", "with a faint residual stream", "greedy",
        "finite", "places", "token ids", "weights", "rounding", "rotary", "runs",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "slim", tmp_path / "onnx"] or sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["onnx", "slim"]


@pytest.mark.parametrize("quantizer", ["k-quant", "gptq"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_quantizer_is_proven(tmp_path: Path, precision: str, quantizer: str) -> None:
    model = tiny_model("llama", hidden_size=84)
    ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = ids if quantizer == "gptq" else None
    folder = exported(
        tmp_path, model, precision=precision, quantizer=quantizer, calibration=calibration
    )
    assert proven(folder, model, precision).passed


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_activation_exported_as_another_is_caught(
    tmp_path: Path, precision: str, activation: str
) -> None:
    """Case 3: at fp16 and int8 such a file passed."""
    small = {"initializer_range": 0.02}
    silu = tiny_model("llama", **small)
    folder = exported(tmp_path, silu, precision=precision)
    model = tiny_model("llama", hidden_act=activation, **small)
    model.load_state_dict(silu.state_dict())
    report = proven(folder, model, precision)
    assert {"the graph in fp32", "with a faint residual stream"} <= names(report)
    assert names(report) <= {"the graph in fp32", "with a faint residual stream", "greedy"}
    assert report.departs is not None
    assert report.departs.startswith("layer 0 is the first to differ")
    assert report.departs in report.failures


def edited(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change a graph in place."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    change(model.graph)
    for file in folder.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")


def tensor_edited(name: str, fault: Callable[[np.ndarray], None]) -> Callable[..., None]:
    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (t for t in graph.initializer if t.name == name)
        array = np.array(numpy_helper.to_array(tensor))
        fault(array)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def _not_a_number(array: np.ndarray) -> None:
    array.reshape(-1)[5] = np.nan


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_a_number_fails(tmp_path: Path, precision: str, flavour: str) -> None:
    model = tiny_model("llama")
    folder = exported(tmp_path, model, precision=precision, flavour=flavour)
    name = "model.layers.1.input_layernorm.weight"
    edited(folder, tensor_edited(name, _not_a_number))
    report = proven(folder, model, precision)
    assert {"finite", "weights", "the graph in fp32", "as shipped"} <= names(report)
    assert f"tensor that is not finite: {name}" in report.failures
    in_fp32 = [c for c in report.checks if c.name.startswith("the graph in fp32")]
    assert np.isnan([c.value for c in in_fp32]).all()
    # Where `ort` rounds activations to int8, a number comes of one that is none.
    if flavour != "ort" or precision not in ("int8", "int4"):
        assert "greedy" in names(report)
        assert np.isnan(report.logits_max_error)


def test_a_value_that_is_not_a_number_passes_no_check() -> None:
    assert at_most("error", 1.0, 1.0, "").passed
    assert not at_most("error", float("nan"), 1.0, "").passed
    assert not at_most("error", float("inf"), 1.0, "").passed


def _swap_rows(array: np.ndarray) -> None:
    array[[0, 1]] = array[[1, 0]]


def _zero(array: np.ndarray) -> None:
    # The level in the middle of the range, two a byte.
    array[:] = 0x88


@pytest.mark.parametrize("quantizer", ["nearest", "gptq"])
@pytest.mark.parametrize("fault", [_swap_rows, _zero])
def test_levels_are_no_reference_of_their_own(
    tmp_path: Path, fault: Callable[[np.ndarray], None], quantizer: str
) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = ids if quantizer == "gptq" else None
    folder = exported(
        tmp_path, model, precision="int4", quantizer=quantizer, calibration=calibration
    )
    edited(folder, tensor_edited("model.layers.1.mlp.up.blocks", fault))
    report = proven(folder, model, "int4")
    assert "rounding" in names(report)
    (check,) = (check for check in report.checks if check.name == "rounding")
    assert check.says.startswith("model.layers.1.mlp.up_proj.weight lies")
    # The reference holds the model's own weight there, so that logits show it too.
    assert "the graph in fp32" in names(report)


def test_a_file_that_does_not_run_is_a_failed_proof(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = exported(tmp_path, model)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    report = proven(folder, model)
    assert names(report) == {"runs"}
    assert "does not hold all of 'lm_head.weight'" in report.failures[0]
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"onnx is no folder; expected"):
        proven(folder, model)


def test_a_search_that_fails_is_said_and_the_proof_stays_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(proof, "first_divergence", fails)
    folder = exported(tmp_path, tiny_model("llama", seed=0))
    report = proven(folder, tiny_model("llama", seed=1))
    assert not report.passed
    assert report.departs == (
        "the search for the first part that differs failed: a shape does not fit"
    )


def test_the_runtimes_own_fault_is_told_from_the_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships differs from the graph in fp32, which equals the model."""
    monkeypatch.setitem(proof.RELATIVE_TOLERANCE, "int8", 1e-9)
    model = tiny_model("llama")
    report = proven(exported(tmp_path, model, precision="int8"), model, "int8")
    assert "as shipped" in names(report)
    assert "the graph in fp32" not in names(report)
    assert report.departs is not None
    assert "is the first to differ" in report.departs


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("flavour", ["ort", "standard"])
def test_an_adapter_is_proven_switched_on(tmp_path: Path, flavour: str, precision: str) -> None:
    """Case A6: the base alone was."""
    plan = per_layer_plan(tiny_model("qwen2"))
    base = narrow_model(tiny_model("qwen2"), plan)
    peft = {name: tmp_path / name for name in ("law", "code")}
    for seed, path in enumerate(peft.values()):
        narrow_peft(with_lora(tiny_model("qwen2"), seed), plan).save_pretrained(path)
    folder = exported(tmp_path, base, flavour=flavour, precision=precision, adapters=peft)
    report = proven(folder, base, precision, adapters=peft)
    assert report.passed, report.failures
    assert {"law on", "code on"} <= {check.name.split(",")[0] for check in report.checks}
    other = proven(folder, base, precision, adapters={"law": peft["code"]})
    assert names(other) == {"factors"}
    assert "from peft's" in other.failures[0]


def test_an_adapter_that_the_graph_does_not_add_is_caught(tmp_path: Path) -> None:
    base = tiny_model("llama")
    with_lora(tiny_model("llama")).save_pretrained(tmp_path / "law")
    folder = exported(tmp_path, base, adapters={"law": tmp_path / "law"})

    def change(graph: onnx.GraphProto) -> None:
        (node,) = (n for n in graph.node if n.name == "model.layers.1.mlp.up.adapted")
        (low,) = (n for n in graph.node if n.name == "model.layers.1.mlp.up.lora_low")
        node.input[1] = node.input[0]
        low.input[0] = low.input[0]

    edited(folder, change)
    report = proven(folder, base, adapters={"law": tmp_path / "law"})
    assert {"law on", "the graph in fp32"} <= names(report)


@pytest.mark.parametrize(
    ("settings", "context", "length"),
    [
        ({}, 40, 40),
        ({}, 8192, 1024),
        ({"sliding_window": 4096}, 8192, 4096 + 2 * (TOGETHER + STEPS)),
        ({"sliding_window": 4096}, 2048, 2048),
    ],
)
def test_the_text_reaches_past_every_window(
    settings: dict[str, Any], context: int, length: int
) -> None:
    config = tiny_model("mistral").config
    config.update(settings)
    assert text_length(config, context) == length


def test_the_text_reaches_past_the_length_that_a_scaled_rope_was_trained_on() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 2000}  # fmt: skip
    config = tiny_model("llama", rope_parameters=rope).config
    assert text_length(config, 8192) == 2000 + 2 * (TOGETHER + STEPS)


def test_logits_are_asked_for_over_the_whole_context(tmp_path: Path) -> None:
    model = tiny_model("llama")
    report = proven(exported(tmp_path, model, context=256), model)
    assert report.positions[0] == 0
    assert report.positions[-1] == 255
    assert any(32 <= position < 64 for position in report.positions)
    assert len(report.position_max_error) == len(report.positions) >= 32
