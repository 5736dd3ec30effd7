"""Invariant 2: narrow == ONNX, logits and greedy tokens, both flavours, both widths policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.manifest import verify_manifest
from atp_export.runtime import Generation, Sampling, Session, choose, generate_tokens
from atp_export.verification.float64_reference import rounding_of
from atp_export.verification.verify import verify
from transformers import PreTrainedModel

from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import plan_of
from tests.sources import edit
from tests.tiny import CUTS, PAIR_PLANS, PLANS, tiny_model, to_cut


class Numbers:
    """A tokenizer of tiny models: text is numbers, and all else is token 0."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(t) if t.isdigit() else 0 for t in text.split()]}


PROMPTS = ["1 2 3 4 5 6 7", "9 8 7 6", "50 51 52 53 54 55 56 57 58 59", "13 13 14 96"]


def exported(tmp_path: Path, model: PreTrainedModel, **options: Any) -> Path:
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", **options)
    return tmp_path / "onnx"


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize(("family", "policy"), CUTS)
def test_narrow_equals_onnx(tmp_path: Path, family: str, policy: str, flavour: str) -> None:
    slim = narrow_model(*to_cut(family, policy, tied=policy.startswith("uniform")))
    folder = exported(tmp_path, slim, flavour=flavour)
    report = verify(folder, slim, Numbers(), PROMPTS, new_tokens=12)
    assert report.passed, report
    assert report.greedy_same == report.greedy_total == len(PROMPTS)
    assert report.logits_max_error < 1e-4


@pytest.mark.parametrize(
    "rope",
    [
        # Case 13c: transformers' Llama turns whole heads whatever this says.
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
@pytest.mark.parametrize("policy", ["all kept", *PAIR_PLANS])
def test_scaled_rotary_embeddings_match(tmp_path: Path, rope: dict[str, Any], policy: str) -> None:
    model = tiny_model("llama", head_dim=32, rope_parameters=rope | {"rope_theta": 10000.0})
    if policy in PAIR_PLANS:
        model = narrow_model(model, PAIR_PLANS[policy](model))
    report = verify(exported(tmp_path, model), model, Numbers(), PROMPTS, new_tokens=12)
    assert report.passed, report


def test_scaled_positions_under_their_old_key_are_kept(tmp_path: Path) -> None:
    """Case 13b: `rope_scaling`, as transformers 4 wrote it."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    save_narrow(tiny_model("llama", rope_parameters=rope), None, tmp_path / "slim")
    edit(
        tmp_path / "slim" / "config.json",
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    export_onnx(tmp_path / "slim", tmp_path / "onnx")
    model = load_narrow(tmp_path / "slim")
    assert model.config.rope_parameters["factor"] == 2.0
    assert verify(tmp_path / "onnx", model, Numbers(), PROMPTS, new_tokens=4).passed


@pytest.mark.parametrize("flavour", ["ort", "standard", "portable"])
def test_a_sliding_window_is_kept(tmp_path: Path, flavour: str) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 4
    folder = exported(tmp_path, model, flavour=flavour)
    assert verify(folder, model, Numbers(), PROMPTS, new_tokens=12).passed


@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama-biases", "per-layer"), ("qwen3", "per-layer"), ("qwen2", "per-layer pairs")],
)
def test_the_portable_flavour_needs_no_new_operators(
    tmp_path: Path, family: str, policy: str
) -> None:
    slim = narrow_model(*to_cut(family, policy))
    folder = exported(tmp_path, slim, flavour="portable")
    assert verify(folder, slim, Numbers(), PROMPTS, new_tokens=12).passed
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]


@pytest.mark.parametrize("flavour", ["ort", "standard"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_batch_may_be_padded_on_either_side(
    tmp_path: Path, side: str, window: int | None, flavour: str
) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = window
    session = Session(exported(tmp_path, model, flavour=flavour))
    rows = [[5, 6, 7], [1, 2, 3, 4, 5]]
    tokens, mask = np.zeros((2, 5), np.int64), np.zeros((2, 5), np.int64)
    for i, row in enumerate(rows):
        place = slice(5 - len(row), 5) if side == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = row, 1
    batch = Generation(session, 2, 9)
    every = batch.step(tokens, mask)
    last = Generation(session, 2, 9).step(tokens, mask, last_only=True)
    following = batch.step(np.array([[8], [9]]))
    for i, row in enumerate(rows):
        alone = Generation(session, 1, 9)
        expected = alone.step(np.array([row]))[0]
        np.testing.assert_allclose(every[i][mask[i] == 1], expected, atol=1e-5)
        np.testing.assert_allclose(last[i, 0], expected[-1], atol=1e-5)
        np.testing.assert_allclose(following[i], alone.step(np.array([[8 + i]]))[0], atol=1e-5)


def test_verify_fails_on_the_wrong_model(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama", seed=0))
    report = verify(folder, tiny_model("llama", seed=1), Numbers(), PROMPTS, new_tokens=8)
    assert not report.passed
    assert "logits differ" in report.failures[0]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_lower_precisions_stay_near_and_are_smaller(tmp_path: Path, precision: str) -> None:
    # Widths that no block of 32 divides, and enough of them that the vocabulary is not the most.
    model = tiny_model("llama", hidden_size=144, intermediate_size=500)
    folder = exported(tmp_path, model, precision=precision)
    report = verify(folder, model, Numbers(), PROMPTS, new_tokens=8, precision=precision)
    assert report.passed, report
    assert report.logits_relative_error > 0
    stored = sum(f.stat().st_size for f in folder.glob("model.onnx*"))
    full = sum(p.numel() for p in model.parameters()) * 4
    assert stored < full * {"fp16": 0.6, "int8": 0.5, "int4": 0.4}[precision]


def test_names_and_cache_shapes_are_the_ecosystems(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    folder = exported(tmp_path, narrow_model(dense, PLANS["per-layer"](dense)), flavour="standard")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inputs = {i.name: i for i in graph.input}
    assert {"input_ids", "attention_mask", "position_ids"} < set(inputs)
    assert graph.output[0].name == "logits"
    kv_heads = [
        inputs[f"past_key_values.{i}.key"].type.tensor_type.shape.dim[1].dim_value for i in range(3)
    ]
    assert kv_heads == [2, 1, 3]
    assert {o.name for o in graph.output} >= {"present.0.key", "present.2.value"}
    assert all(node.domain == "" for node in graph.node)


def test_the_cache_of_a_layer_is_as_wide_as_its_heads(tmp_path: Path) -> None:
    slim = narrow_model(*to_cut("llama", "per-layer pairs"))
    session = Session(exported(tmp_path, slim))
    assert [i.shape[3] for i in session.past.values()] == [16, 16, 32, 32, 16, 16]


def test_a_head_dim_that_the_fused_operator_refuses_is_named(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    kept = [(0, 2, 5), (1,)] * 3
    slim = narrow_model(dense, plan_of(model_shape(dense.config), kept, "head-dims"))
    with pytest.raises(ValueError, match=r"head_dim 6 is no multiple of 16.*standard"):
        exported(tmp_path, slim)


def test_a_batch_may_grow_its_cache_only_to_its_capacity(tmp_path: Path) -> None:
    session = Session(exported(tmp_path, tiny_model("llama")))
    state = Generation(session, 1, 4)
    state.step(np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match="do not fit the cache of 4"):
        state.step(np.array([[1, 2]]))


def test_a_row_ends_where_its_end_token_is(tmp_path: Path) -> None:
    session = Session(exported(tmp_path, tiny_model("llama")))
    free = generate_tokens(session, [[1, 2, 3], [7, 8]], max_new_tokens=10)
    ended = generate_tokens(session, [[1, 2, 3], [7, 8]], max_new_tokens=10, ends={free[0][4]})
    assert ended[0] == free[0][: free[0].index(free[0][4])]


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draw = np.random.default_rng(0)
    sampling = Sampling(temperature=1.0, top_p=0.75)
    chosen = [choose(logits, sampling, draw) for _ in range(2000)]
    assert set(chosen) == {0, 1}
    assert np.mean(np.array(chosen) == 0) == pytest.approx(0.625, abs=0.04)
    assert {choose(logits, Sampling(temperature=9.0, top_k=1), draw) for _ in range(20)} == {0}


def test_a_manifest_finds_a_changed_and_a_missing_file(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama"), provenance={"source_model": "tiny"})
    assert verify_manifest(folder)["source_model"] == "tiny"
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\0x"[:1])
    with pytest.raises(ValueError, match=r"model\.onnx\.data .*is not what was shipped"):
        verify_manifest(folder)
    data.unlink()
    with pytest.raises(ValueError, match="is missing"):
        verify_manifest(folder)


def test_a_truncated_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save_narrow(tiny_model("llama"), None, tmp_path / "slim")
    weights = tmp_path / "slim" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        export_onnx(tmp_path / "slim", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model\.onnx"):
        Session(tmp_path)


def test_a_difference_that_rounding_explains_is_told_from_one_it_does_not() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    own = model(ids).logits[0].detach().numpy()
    exact = model.double()(ids).logits[0].detach().numpy()
    near = rounding_of([(own, own, exact)])
    assert near.explains
    assert 0 < near.onnx == near.pytorch < 1e-5
    far = rounding_of([(own + np.float32(1e-3), own, exact)])
    assert not far.explains
    assert far.pytorch == near.pytorch
