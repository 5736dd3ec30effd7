"""openvino_genai's folder: its own tokenizer and generate beside PyTorch's."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.layouts import openvino_genai
from atp_export.layouts.openvino_genai import (
    ask,
    check_openvino,
    prove_openvino,
    to_openvino,
    without_onnx,
)

from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.narrow import narrow_model
from tests.tiny import PLANS, tiny_model
from tests.tiny_tokenizers import tokenizer_of

PROMPTS = ["You may copy the software in 2024", "Permission, naïve and free:"]
needs_openvino_genai = pytest.mark.skipif(
    importlib.util.find_spec("openvino_genai") is None, reason="extra `openvino` is not installed"
)


def converted(
    root: Path, family: str, widths: str, precision: str, kind: str, seed: int = 0
) -> tuple[Path, Any]:
    """(folder that holds model.onnx too, its tokenizer); root/slim is what it was made of."""
    tokenizer = tokenizer_of(kind)
    dense = tiny_model(family, tied=True, vocab_size=len(tokenizer), seed=seed)
    save_narrow(narrow_model(dense, PLANS[widths](dense)), tokenizer, root / "slim")
    export_onnx(root / "slim", root / "folder", flavour="portable", precision=precision)  # type: ignore[arg-type]
    to_openvino(root / "folder")
    return root / "folder", tokenizer


@needs_openvino_genai
@pytest.mark.parametrize(
    ("family", "widths", "precision", "kind"),
    [
        ("llama", "per-layer", "fp32", "byte-level"),
        ("gemma3", "per-layer", "fp32", "metaspace"),
        ("qwen3", "uniform", "int4", "llama-3"),
    ],
)
def test_its_own_generate_takes_the_same_tokens(
    tmp_path: Path, family: str, widths: str, precision: str, kind: str
) -> None:
    folder, tokenizer = converted(tmp_path, family, widths, precision, kind)
    checks = prove_openvino(folder, tokenizer, PROMPTS, precision=precision, new_tokens=16)
    assert [(c.name, c.passed) for c in checks] == [("ids", True), ("greedy", True)]
    without_onnx(folder)
    if precision == "fp32":
        answers = ask(folder, texts=[], prompts=PROMPTS, new_tokens=16)
        assert answers.tokens == [greedy(tmp_path / "slim", tokenizer, p, 16) for p in PROMPTS]


def greedy(slim: Path, tokenizer: Any, prompt: str, count: int) -> list[int]:
    """PyTorch's."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = load_narrow(slim).generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return made[0, ids.shape[1] :].tolist()


@needs_openvino_genai
def test_another_model_or_tokenizer_is_noticed(tmp_path: Path) -> None:
    folder, tokenizer = converted(tmp_path / "a", "llama", "uniform", "fp32", "byte-level")
    other, _ = converted(tmp_path / "b", "llama", "uniform", "fp32", "byte-level", seed=1)
    third, _ = converted(tmp_path / "c", "llama", "uniform", "fp32", "llama-3")
    for source, name, failed in ((other, "model", "greedy"), (third, "tokenizer", "ids")):
        for kind in ("xml", "bin"):
            shutil.copy(source / f"openvino_{name}.{kind}", folder)
        checks = prove_openvino(folder, tokenizer, PROMPTS, precision="int4", new_tokens=4)
        assert failed in {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_file_that_computes_no_numbers_is_not_proven(
    monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """Whichever prompt has what is not a number."""
    right = np.eye(8)[[[3, 3]]]
    answers = iter([right * np.nan if i == broken else right for i in range(2)])
    step = SimpleNamespace(step=lambda fed, first: next(answers))
    monkeypatch.setattr(openvino_genai, "Generation", lambda *sizes: step)
    session: Any = None
    assert not openvino_genai._greedy(session, [[1, 2]] * 2, [[3, 3]] * 2, 0.01).passed


@needs_openvino_genai
def test_generation_ends_at_every_end_token(tmp_path: Path) -> None:
    import openvino_genai as genai

    folder, _ = converted(tmp_path, "llama", "per-layer", "fp32", "byte-level")
    made = ask(folder, texts=[], prompts=PROMPTS[:1], new_tokens=8).tokens[0]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"eos_token_id": [1, made[0]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    pipeline = genai.LLMPipeline(folder, "CPU")
    config = pipeline.get_generation_config()
    config.max_new_tokens = 8
    ids = pipeline.get_tokenizer().encode(PROMPTS[0])
    assert len(pipeline.generate(ids, config).tokens[0]) == 1


@pytest.mark.parametrize(
    ("flavour", "precision", "keep", "message"),
    [
        ("ort", "fp32", False, "with --flavour ort: it is made from portable"),
        ("portable", "bf16", False, "with bf16: expected one of fp32, fp16, int8, int4"),
        ("portable", "fp32", True, "left LoRA apart"),
    ],
)
def test_what_has_no_such_folder_is_refused(
    flavour: str, precision: str, keep: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_openvino(flavour, precision, keep_adapter=keep)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_genai, "PACKAGES", ("numpy", "openvino_of_no_one"))
    with pytest.raises(ValueError, match=r"needs openvino_of_no_one: pip install 'atp-edge\[op"):
        check_openvino("portable", "fp32", keep_adapter=False)


@needs_openvino_genai
def test_a_tokenizer_that_cannot_be_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino_tokenizers

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such step")

    monkeypatch.setattr(openvino_tokenizers, "convert_tokenizer", fails)
    with pytest.raises(ValueError, match=r"cannot convert .*no such step\); use another layout"):
        converted(tmp_path, "llama", "uniform", "fp32", "byte-level")
