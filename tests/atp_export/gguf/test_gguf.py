"""GGUF files: read back tensor by tensor, and by llama.cpp itself where it is at hand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atp_export.gguf.tensors import llama3_factors, packed_q4
from atp_export.gguf.vocabulary import pre_tokenizer
from atp_export.gguf.write import write_gguf
from gguf import GGMLQuantizationType, GGUFReader, quants
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from tests.tiny import PAIR_PLANS, PLANS, tiny_model


def slim(folder: Path, real_folder: Path, family: str, policy: str, **sizes: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    dense = tiny_model(family, tied=True, vocab_size=len(tokenizer), **sizes)
    save_narrow(narrow_model(dense, (PLANS | PAIR_PLANS)[policy](dense)), tokenizer, folder)
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys, tensors as fp32) of a file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("family", "policy", "architecture"),
    [
        ("llama", "uniform", "llama"),
        ("llama-biases", "per-layer", "deci"),
        ("qwen2", "uniform", "llama"),
        ("qwen2", "per-layer", "deci"),
        ("qwen3", "uniform", "qwen3"),
    ],
)
def test_sizes_and_weights_are_the_checkpoint_s(
    tmp_path: Path, real_folder: Path, family: str, policy: str, architecture: str
) -> None:
    folder = slim(tmp_path / "slim", real_folder, family, policy)
    keys, tensors = read(write_gguf(folder, tmp_path / "gguf", precision="f32"))
    model = load_narrow(folder)
    shape = model_shape(model.config)
    assert keys["general.architecture"] == architecture
    for name, values in (
        ("attention.head_count", [x.heads for x in shape.layers]),
        ("attention.head_count_kv", [x.kv_heads for x in shape.layers]),
        ("feed_forward_length", [x.channels for x in shape.layers]),
    ):
        assert keys[f"{architecture}.{name}"] == (values if architecture == "deci" else values[0])
    state = model.state_dict()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], _of(state, 1, "mlp.down_proj.weight"))
    q = _of(state, 0, "self_attn.q_proj.weight")
    d = shape.layers[0].head_dim
    if architecture in ("llama", "deci"):
        # llama.cpp turns rows 2i and 2i + 1 of a head together, transformers i and i + d/2.
        order = np.stack([np.arange(d // 2), np.arange(d // 2) + d // 2], 1).flatten()
        q = q.reshape(-1, d, q.shape[1])[:, order].reshape(q.shape)
    assert np.array_equal(tensors["blk.0.attn_q.weight"], q)
    assert ("blk.0.attn_q_norm.weight" in tensors) == (family == "qwen3")
    assert ("blk.0.attn_v.bias" in tensors) == (family in ("qwen2", "llama-biases"))


def _of(state: dict[str, Any], layer: int, name: str) -> Any:
    return state[f"model.layers.{layer}.{name}"].numpy()


def test_q4_blocks_are_what_ggml_reads() -> None:
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 16, (3, 64)).astype(np.uint8)
    scales = draw.normal(size=(3, 2)).astype(np.float16).astype(np.float32)
    zeros = draw.integers(0, 16, (3, 2)).astype(np.float32)
    wide = np.repeat(scales, 32, axis=1)
    found = quants.dequantize(packed_q4(levels, scales, None), GGMLQuantizationType.Q4_0)
    np.testing.assert_allclose(found, (levels - 8.0) * wide, rtol=1e-6)
    found = quants.dequantize(packed_q4(levels, scales, zeros), GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(found, (levels - np.repeat(zeros, 32, axis=1)) * wide, atol=2e-2)


def test_llama3_s_frequencies_are_transformers_own() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = tiny_model("llama", rope_parameters=rope).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / rope["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / llama3_factors(rope, 16), scaled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "policy", "sizes", "message"),
    [
        ("qwen3", "per-layer", {}, "no norms of queries and keys; train with --widths uniform"),
        ("llama", "uniform pairs", {"head_dim": 32}, "train with --decision-space groups"),
        ("mistral", "uniform", {"sliding_window": 64}, "a sliding window of 64 tokens"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(
    tmp_path: Path, real_folder: Path, family: str, policy: str, sizes: Any, message: str
) -> None:
    window = sizes.pop("sliding_window", None)
    folder = slim(tmp_path / "slim", real_folder, family, policy, **sizes)
    if window:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    with pytest.raises(ValueError, match=message):
        write_gguf(folder, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_tokenizer_without_a_rule_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    odd = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}
    with pytest.raises(ValueError, match=r"its pre-tokenizer \(\['Whitespace'\]\) is none that"):
        pre_tokenizer(odd, tmp_path)


LLAMA = os.environ.get("ATP_NODE_FOLDER", "")
needs_llama_cpp = pytest.mark.skipif(
    not (Path(LLAMA) / "node_modules" / "node-llama-cpp").is_dir(),
    reason="node-llama-cpp is not installed: `make test` installs it where npm is at hand",
)


def by_llama_cpp(file: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """llama.cpp's greedy tokens after given ids."""
    asked = json.dumps({"file": str(file), "prompts": prompts, "new": new_tokens})
    script = Path(__file__).with_name("greedy.mjs")
    done = subprocess.run(
        ["node", str(script), asked],
        cwd=LLAMA,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def by_torch(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                              do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        found.append(made[0, len(prompt) :].tolist())
    return found


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "policy"),
    [("llama", "uniform"), ("llama-biases", "per-layer"), ("qwen2", "per-layer"),
     ("qwen2", "uniform"), ("qwen3", "uniform")],
)  # fmt: skip
def test_llama_cpp_gives_the_same_greedy_tokens(
    tmp_path: Path, real_folder: Path, family: str, policy: str
) -> None:
    folder = slim(tmp_path / "slim", real_folder, family, policy)
    file = write_gguf(folder, tmp_path / "gguf", precision="f32")
    prompts = [[5, 6, 7, 8], list(range(100, 140))]
    assert by_llama_cpp(file, prompts, 24) == by_torch(load_narrow(folder), prompts, 24)
