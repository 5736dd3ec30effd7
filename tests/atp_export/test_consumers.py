"""What consumers read beside the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from atp_export.consumers import end_tokens
from atp_export.export import export_onnx
from atp_export.runtime import Session
from transformers import AutoTokenizer, LlamaConfig

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.storage import LONGEST_CONTEXT, context_of
from tests.sources import edit, save_source
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 2}, 2, [2, 0]),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, 3, [7, 3]),
        ({}, {"eos_token_id": [5, 6]}, 6, [5, 6]),
        ({"eos_token_id": None}, {"eos_token_id": 4}, None, [4]),
        ({}, {"eos_token_id": None}, 1, [1]),
        ({}, {}, None, []),
    ],
)
def test_every_end_token_is_kept(
    generation: dict[str, Any], config: dict[str, Any], tokenizer: int | None, expected: list[int]
) -> None:
    assert end_tokens(generation, config, tokenizer) == expected


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [(256, 0, 256), (131072, 0, LONGEST_CONTEXT), (131072, 131072, 131072), (256, 64, 64)],
)
def test_the_context_is_the_models_own_unless_it_is_very_long(
    own: int, asked: int, expected: int
) -> None:
    assert context_of(LlamaConfig(max_position_embeddings=own), asked) == expected


def test_a_longer_context_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a context of 300 tokens: .*was made for 256; ask for"):
        context_of(LlamaConfig(max_position_embeddings=256), 300)


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())
    return found


@pytest.mark.parametrize(("context", "rows"), [(0, 256), (64, 64)])
def test_tables_and_configurations_have_the_context(
    tmp_path: Path, context: int, rows: int
) -> None:
    save_source(tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", context=context)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    tables = {t.name: list(t.dims) for t in graph.initializer if t.name.startswith("rotary.")}
    assert tables == {"rotary.cos": [rows, 8], "rotary.sin": [rows, 8]}
    about = described(tmp_path / "onnx")
    assert about["model"]["context_length"] == about["search"]["max_length"] == rows
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["max_position_embeddings"] == rows
    assert Session(tmp_path / "onnx").context == rows


@pytest.mark.parametrize("missing", ["bos_token_id", "pad_token_id", "eos_token_id"])
def test_a_special_token_that_is_null_is_left_out(tmp_path: Path, missing: str) -> None:
    model = tiny_model("llama", **{missing: None})
    model.generation_config.eos_token_id = None
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx")
    about = described(tmp_path / "onnx")["model"]
    assert None not in about.values()
    assert (missing in about) == (missing == "pad_token_id")
    genai = pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    if missing == "eos_token_id":
        return  # It wants one.
    genai.Model(str(tmp_path / "onnx"))


def test_the_folder_is_read_by_transformers_without_code_or_weights(tmp_path: Path) -> None:
    source = save_source(tmp_path / "slim", dtype=torch.float16)
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_per_layer.X"})
    export_onnx(source, tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    text = "You may copy"
    read, before = (AutoTokenizer.from_pretrained(tmp_path / f) for f in ("onnx", "slim"))
    assert read(text)["input_ids"] == before(text)["input_ids"]
    written = json.loads((tmp_path / "onnx" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("flavour", "precision", "window", "opset", "ir"),
    [
        ("portable", "fp32", None, 18, 8),
        ("portable", "fp16", None, 18, 8),
        ("portable", "int4", None, 21, 10),
        ("standard", "fp32", None, 23, 10),
        ("ort", "fp32", None, 23, 10),
        ("ort", "fp32", 4, 24, 10),
        ("standard", "fp32", 4, 23, 10),
        ("portable", "fp32", 4, 18, 8),
    ],
)
def test_a_file_opens_in_the_oldest_runtime_that_computes_it_rightly(
    tmp_path: Path, flavour: Any, precision: Any, window: int | None, opset: int, ir: int
) -> None:
    """IR 9 is what onnxruntime 1.17 reads at most. 1.23 reads a window of GroupQueryAttention
    otherwise, without a word: opset 24, which it does not know, keeps such a file from it."""
    model = tiny_model("mistral")
    model.config.sliding_window = window
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", flavour=flavour, precision=precision)
    written = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert written.ir_version == ir
    assert {o.domain: o.version for o in written.opset_import}[""] == opset
    provenance = json.loads((tmp_path / "onnx" / "manifest.json").read_text())["provenance"]
    assert provenance["onnxruntime"] >= (">=1.17" if ir == 8 else ">=1.20")
