"""Every family through the command line: trained, cut, exported, proven, read again."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from atp_export.gguf.llama_cpp import node_folder
from atp_export.runtime import Session, generate_tokens
from transformers import AutoModelForCausalLM

from atp_edge.config import Flavour, WidthsPolicy
from tests.atp_edge.pipeline.test_what_ships import DATA, QUICK, call
from tests.sources import save_source
from tests.tiny import FAMILIES, NEW_FAMILIES
from tests.tiny_tokenizers import tokenizer_of

FLAVOURS, WIDTHS = get_args(Flavour), get_args(WidthsPolicy)
ELSEWHERE = ("gemma3", "qwen3")
"""Of tests of their own."""


def check_run(folder: Path, family: str, *, widths: str = "", kind: str = "byte-level") -> str:
    """Another flavour and policy for every family in turn; what `export` said."""
    i = list(NEW_FAMILIES).index(family) if family in NEW_FAMILIES else 0
    tokenizer = tokenizer_of(kind, bos=False)
    # Rows to spare, as real models have: transformers gives Qwen2's tokenizer one more token.
    rows = len(tokenizer) + 8
    source = save_source(
        folder / "source", family, tied=bool(i % 2), tokenizer=tokenizer, vocab_size=rows
    )
    out = str(folder / "run")
    settings = ["--export-flavour", FLAVOURS[i % 3], "--widths", widths or WIDTHS[i % 2]]
    call("train", "--out", out, "--model", str(source), "--data", str(DATA), *settings, *QUICK)
    _, said, _ = [call(stage, "--out", out) for stage in ("shrink", "export", "verify")]
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "slim").eval()
    row = [5, 6, 7, 8, 9]
    (new,) = generate_tokens(Session(folder / "run" / "onnx"), [row], max_new_tokens=4)
    read = model(torch.tensor([row + new])).logits[0, len(row) - 1 : -1]
    assert read.argmax(-1).tolist() == new
    return said


GENAI = "onnxruntime-genai's own tokenizer gives other ids"


def check_gguf(run: Path) -> None:
    """By llama.cpp where it is at hand."""
    shown = call("export", "--out", str(run), "--to", str(run.parent / "gguf"), "--format", "gguf",
                 "--precision", "f32")  # fmt: skip
    assert ("same token ids" if node_folder() else "not proven here") in shown


def test_gemma_3_is_trained_shipped_and_read_again_as_onnx_and_gguf(tmp_path: Path) -> None:
    said = check_run(tmp_path, "gemma3", widths="uniform", kind="gemma")
    card = (tmp_path / "run" / "onnx" / "README.md").read_text()
    for told in (said, card):
        assert GENAI in " ".join(told.split())
    check_gguf(tmp_path / "run")
    said = call("export", "--out", str(tmp_path / "run"), "--to", str(tmp_path / "js"), "--layout",
                "transformers.js")  # fmt: skip
    assert GENAI not in " ".join(said.split())


@pytest.mark.large
@pytest.mark.parametrize(("family", "widths"), [("phi4-mini", "per-layer"), ("qwen3", "uniform")])
def test_a_family_ships_as_gguf_too(tmp_path: Path, family: str, widths: str) -> None:
    check_run(tmp_path, family, widths=widths)
    check_gguf(tmp_path / "run")


@pytest.mark.large
@pytest.mark.parametrize("family", [f for f in [*FAMILIES, *NEW_FAMILIES] if f not in ELSEWHERE])
def test_a_family_is_trained_shipped_and_read_again(tmp_path: Path, family: str) -> None:
    check_run(tmp_path, family)
