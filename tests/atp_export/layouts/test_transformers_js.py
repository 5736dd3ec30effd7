"""transformers.js's layout: the same model under the names that it looks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort
import pytest
from atp_export.export import export_onnx
from atp_export.layouts.transformers_js import check_transformers_js, to_transformers_js
from atp_export.runtime import Session, generate_tokens
from transformers import AutoTokenizer

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model
from tests.tiny import PLANS, tiny_model

TEXT, NEW = "The licence of 2024: free software, naïve and", 8


def laid_out(root: Path, real_folder: Path, widths: str, precision: str) -> tuple[Path, list[int]]:
    """(folder, greedy tokens of the model before its files were renamed)."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    dense = tiny_model("llama", tied=True, vocab_size=len(tokenizer))
    save_narrow(narrow_model(dense, PLANS[widths](dense)), tokenizer, root / "slim")
    folder = root / "model"
    export_onnx(root / "slim", folder, flavour="portable", precision=precision)  # type: ignore[arg-type]
    ids = tokenizer(TEXT)["input_ids"]
    (tokens,) = generate_tokens(Session(folder), [ids], max_new_tokens=NEW)
    to_transformers_js(folder, precision)
    return folder, tokens


def test_names_and_configuration_are_those_that_it_looks_for(
    tmp_path: Path, real_folder: Path
) -> None:
    folder, _ = laid_out(tmp_path, real_folder, "per-layer", "int4")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*model*")}
    assert names == {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}
    config = json.loads((folder / "config.json").read_text())
    named = {"dtype": "q4", "use_external_data_format": True}
    assert config["transformers.js_config"] == named
    session = ort.InferenceSession(str(folder / "onnx" / "model_q4.onnx"))
    assert "past_key_values.0.key" in {i.name for i in session.get_inputs()}


def test_a_precision_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="with bf16: expected one of fp32, fp16, int8, int4"):
        check_transformers_js("bf16")


@pytest.mark.large
@pytest.mark.parametrize(
    ("widths", "precision"), [("per-layer", "fp32"), ("per-layer", "int4"), ("uniform", "fp16")]
)
def test_its_own_generate_gives_the_same_tokens(
    tmp_path: Path, real_folder: Path, widths: str, precision: str
) -> None:
    node = Path(os.environ.get("ATP_NODE_FOLDER_LARGE", "build/large/node"))
    package = node / "node_modules" / "@huggingface" / "transformers"
    if shutil.which("node") is None or not package.is_dir():
        pytest.skip("needs node, and @huggingface/transformers under build/large/node")
    folder, tokens = laid_out(tmp_path, real_folder, widths, precision)
    script = Path(__file__).with_name("transformers_js.mjs").absolute()
    done = subprocess.run(
        ["node", str(script), str(folder), TEXT, str(NEW)],
        cwd=node, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == AutoTokenizer.from_pretrained(real_folder)(TEXT)["input_ids"]
    assert found["tokens"] == tokens
