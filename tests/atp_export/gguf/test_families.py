"""GGUF of every family: by llama.cpp itself, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atp_export.gguf.architecture import architecture_of
from atp_export.gguf.llama_cpp import ask, node_folder
from atp_export.gguf.rope import STILL, angles_of
from atp_export.gguf.write import write_gguf

from atp_edge.model.families import model_shape
from tests.atp_export.gguf.cut_models import AS_LLAMA, CELLS, CHECKS, OWN, SIZES, proof_of, slim
from tests.tiny import FAMILIES, NEW_FAMILIES, tiny_model
from tests.tiny_tokenizers import tokenizer_of

NODE = node_folder()
needs_llama_cpp = pytest.mark.skipif(
    NODE is None,
    reason="node-llama-cpp is not installed: `make test` installs it where npm is at hand",
)
QUICK = [("gemma3", "uniform"), ("phi4-mini", "per-layer"), ("granite", "uniform"),
         ("glm4", "uniform")]  # fmt: skip
"""Those that hold most of what families do otherwise; the others are in `make test-large`."""


def check_in_llama_cpp(root: Path, family: str, widths: str, kind: str = "byte-level") -> None:
    proof = proof_of(root, family, widths, "f32", NODE, kind)
    assert proof.failures == []
    assert {check.name for check in proof.checks} == CHECKS


@needs_llama_cpp
@pytest.mark.parametrize(("family", "widths"), QUICK)
def test_llama_cpp_agrees_with_pytorch(tmp_path: Path, family: str, widths: str) -> None:
    check_in_llama_cpp(tmp_path, family, widths)


@needs_llama_cpp
@pytest.mark.large
@pytest.mark.parametrize(("family", "widths"), [cell for cell in CELLS if cell not in QUICK])
def test_llama_cpp_agrees_with_every_other(tmp_path: Path, family: str, widths: str) -> None:
    check_in_llama_cpp(tmp_path, family, widths)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["llama-2", "gemma"])
def test_llama_cpp_splits_as_sentencepiece_does(tmp_path: Path, kind: str) -> None:
    check_in_llama_cpp(tmp_path, "gemma3", "uniform", kind)
    assert NODE is not None
    texts = [f"a{sign * n}software{sign * n}" for sign in " \n\t" for n in (2, 3, 31, 32, 70)]
    texts += ["本ソフトウェアは" * 40, "https://of.the.system/" * 9]
    tokenizer = tokenizer_of(kind, bos=False)
    theirs = ask(tmp_path / "gguf" / "model.gguf", NODE, texts=texts).ids
    assert theirs == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("family", [*FAMILIES, *NEW_FAMILIES])
def test_a_family_has_one_architecture(family: str) -> None:
    model = tiny_model(family, tied=family == "gemma2", **SIZES.get(family, {}))
    found = architecture_of(model.config, model_shape(model.config), 64)
    assert found.name == ("llama" if family in AS_LLAMA else OWN[family])


@pytest.mark.parametrize(
    ("family", "widths", "sizes", "message"),
    [
        ("gemma3", "per-layer", {}, "alone, whose layers are Llama's: no norms of queries and"),
        ("granite", "per-layer", {}, "no factors on embedding, residual, scores or logits"),
        ("smollm3", "uniform", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]},
         "RoPE that turns other layers than three of every four"),
        ("olmo2", "uniform", {"head_dim": 16}, "6 heads of 16 in a hidden size of 48"),
        ("gemma2", "uniform", {"attn_logit_softcapping": None}, "without a cap"),
        ("gemma3", "uniform", {"final_logit_softcapping": 3.0}, "capped logits"),
        ("gemma3", "uniform", {"attention_bias": True}, "a bias of k_proj"),
        ("exaone4", "uniform", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
         "3 layers, some with a sliding window"),
        ("phi3", "uniform", {"sliding_window": 7}, "a sliding window of 7 tokens"),
        ("glm4", "uniform", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0,
         "rope_theta": 1e4, "partial_rotary_factor": 0.5, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "rope_type 'llama3'"),
    ],
)  # fmt: skip
def test_what_an_architecture_does_not_read_is_refused_by_name(
    tmp_path: Path, family: str, widths: str, sizes: dict[str, Any], message: str
) -> None:
    slim(tmp_path / "slim", family, widths, **sizes)
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "slim", tmp_path / "gguf", context=64)
    assert not (tmp_path / "gguf").exists()


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", {"rope_parameters": LLAMA_3}), ("phi4-mini", {})]
)
def test_angles_are_transformers_own(family: str, sizes: dict[str, Any]) -> None:
    model: Any = tiny_model(family, **sizes)
    shape = model_shape(model.config)
    angles = angles_of(model.config, shape, architecture_of(model.config, shape, 64))
    assert angles.factors is not None
    head_dim, base = shape.layers[0].head_dim, model.config.rope_parameters["rope_theta"]
    theirs = base ** (-np.arange(0, head_dim, 2) / head_dim) / angles.factors
    rotary = model.model.rotary_emb
    turned = len(rotary.inv_freq)
    np.testing.assert_allclose(theirs[:turned], rotary.inv_freq.numpy(), rtol=1e-5)
    assert (angles.factors[turned:] == np.float32(STILL)).all()
    assert angles.scale == pytest.approx(rotary.attention_scaling)


def test_a_family_s_tokenizer_that_is_followed_otherwise_is_refused(tmp_path: Path) -> None:
    for kind, message in (("metaspace", "none that llama.cpp is known to follow"),
                          ("phi-3", "<s> takes white space beside it away")):  # fmt: skip
        slim(tmp_path / kind, "gemma3", "uniform", kind)
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / kind, tmp_path / "gguf")
    slim(tmp_path / "slim", "gemma3", "uniform", "gemma")
    path = tmp_path / "slim" / "tokenizer.json"
    written = json.loads(path.read_text())
    merges = written["model"]["merges"]
    words = [m for m in merges if len(set("".join(m))) > 1]
    several = next(m for m in words if sum("".join(n) == "".join(m) for n in words) > 1)
    for changed, message in (
        ([m for m in merges if m != several], "are pieces but make no"),
        ([several, *(m for m in merges if m != several)], "do not follow one another"),
        # Runs of one sign may stand mixed, but only whole, and two single signs last.
        ([m for m in merges if m != ["▁▁", "▁"]], "merges that make '▁+' do not follow"),
        ([["▁", "▁"], *(m for m in merges if m != ["▁", "▁"])], "merges that make '▁+' do not"),
    ):
        path.write_text(json.dumps(written | {"model": written["model"] | {"merges": changed}}))
        with pytest.raises(ValueError, match=message):
            write_gguf(tmp_path / "slim", tmp_path / "gguf")
