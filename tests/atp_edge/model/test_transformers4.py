"""Folders that transformers 4 reads as 5 does: keys here, the real thing by `make test-large`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atp_edge.model.checkpoint import round_weights, save_narrow
from atp_edge.model.loading import load_model, load_tokenizer
from atp_edge.model.narrow import narrow_model
from tests.sources import edit, save_source
from tests.tiny import per_layer_plan, tiny_model, uniform_plan
from tests.tiny_tokenizers import tokenizer_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 100000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def saved(folder: Path, rope: str, **options: Any) -> dict[str, Any]:
    model = tiny_model("llama", rope_parameters=dict(ROPES[rope]))
    save_narrow(model, tokenizer_of("byte-level"), folder, **options)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("rope", ROPES)
def test_rope_and_type_stand_under_the_keys_of_transformers_4(tmp_path: Path, rope: str) -> None:
    config, wanted = saved(tmp_path, rope), dict(ROPES[rope])
    assert config["rope_theta"] == wanted.pop("rope_theta")
    assert config.get("rope_scaling") == (None if rope == "default" else wanted)
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.parametrize("rope", ROPES)
def test_transformers_5_reads_the_same_with_them_as_without(tmp_path: Path, rope: str) -> None:
    saved(tmp_path, rope)
    with_them = AutoConfig.from_pretrained(tmp_path).to_dict()
    edit(tmp_path / "config.json", rope_theta=None, rope_scaling=None, torch_dtype=None)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == with_them
    assert with_them["rope_parameters"] == ROPES[rope]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_tokenizer_has_a_class_that_4_has_and_gives_the_same_ids(
    tmp_path: Path, family: str
) -> None:
    tokenizer = tokenizer_of("llama-3", template="{{ messages }}")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    model = tiny_model(family, vocab_size=len(tokenizer))
    save_narrow(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|tool|>"]
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & set(written)
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = "You may copy 12 <|tool|> copies</s>"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert set(tokenizer.all_special_tokens) <= set(read.all_special_tokens)
    assert read.chat_template == "{{ messages }}"


def test_weights_and_end_tokens_are_those_of_the_source(tmp_path: Path) -> None:
    """Once in the file where embeddings are tied, and no value changes on the way."""
    source = save_source(tmp_path / "source", dtype=torch.bfloat16)
    settings = {"eos_token_id": [1, 0], "do_sample": False, "temperature": 0.9}
    edit(source / "generation_config.json", **settings)
    model = round_weights(load_model(source), torch.bfloat16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    save_narrow(model, load_tokenizer(source), tmp_path / "slim", like=source)
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    sizes = [(f / "model.safetensors").stat().st_size for f in (source, tmp_path / "slim")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert model.dtype == torch.float32
    read = load_model(tmp_path / "slim")
    assert all(torch.equal(x, before[name]) for name, x in read.state_dict().items())
    kept = json.loads((tmp_path / "slim" / "generation_config.json").read_text())
    assert kept == json.loads((source / "generation_config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype="auto")
    assert plain.dtype == torch.bfloat16


_READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, more, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, **json.loads(more)).eval()
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss
print(json.dumps({"ids": ids[0].tolist(), "perplexity": float(loss.exp())}))
"""
TEXT = "You may copy and sell copies of the software, and you may not. <|im_end|> 123 " * 4


def _read_by_4(folder: Path, more: str = "{}") -> subprocess.CompletedProcess[str]:
    python = os.environ.get("ATP_TRANSFORMERS4_PYTHON")
    if python is None:
        pytest.skip("an environment of its own: `make test-large` builds it")
    return subprocess.run(
        [python, "-c", _READ, str(folder), more, TEXT], capture_output=True, text=True, check=False
    )


@pytest.mark.large
@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["dense", "uniform"])
def test_transformers_4_loads_it_with_its_tokenizer_and_is_as_good(
    tmp_path: Path, form: str, family: str, rope: str
) -> None:
    tokenizer = tokenizer_of("llama-3")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    model = tiny_model(family, vocab_size=len(tokenizer), rope_parameters=dict(ROPES[rope]))
    if form == "uniform":
        model = narrow_model(model, uniform_plan(model))
    save_narrow(model, tokenizer, tmp_path)
    done = _read_by_4(tmp_path)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["ids"] == tokenizer(TEXT)["input_ids"]
    ids = torch.tensor([read["ids"]])
    with torch.no_grad():
        expected = float(load_model(tmp_path)(input_ids=ids, labels=ids).loss.exp())
    assert read["perplexity"] == pytest.approx(expected, rel=1e-4)
    # RoPE's base matters to these figures: 4's default would be seen.
    edit(tmp_path / "config.json", rope_theta=None, rope_scaling=None)
    assert json.loads(_read_by_4(tmp_path).stdout)["perplexity"] != pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.large
def test_per_layer_widths_tell_transformers_4_what_they_need(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama-3")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    save_narrow(narrow_model(model, per_layer_plan(model)), tokenizer, tmp_path)
    done = _read_by_4(tmp_path, '{"trust_remote_code": true}')
    assert done.returncode != 0
    assert "need transformers >= 5.20, and this is 4.57" in done.stderr.splitlines()[-1]
