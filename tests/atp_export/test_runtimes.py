"""docs/runtimes.md says what was run, and cells of it are run again."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from atp_export.gguf.llama_cpp import node_folder

from tests.atp_export.runtimes.ask import RUNTIMES
from tests.atp_export.runtimes.cells import GGUF, Cell, export_cell, passages
from tests.atp_export.runtimes.judge import Outcome, try_gguf, try_onnx
from tests.atp_export.runtimes.page import LLAMA_CPP, PAGE, RESULTS, render


def cell(named: str) -> Cell:
    family, flavour, widths, precision = named.split("/")
    return Cell(family=family, flavour=flavour, widths=widths, precision=precision)


ONNX = ["llama/portable/per-layer/int4", "gemma3/ort/per-layer/fp32",
        "qwen3/standard/uniform/int4", "phi4-mini/portable/uniform/fp32"]  # fmt: skip
PAIRS = ["llama/ort/per-layer pairs/int4", "llama/ort/uniform pairs/fp32",
         "llama/standard/per-layer pairs/fp32"]  # fmt: skip
LARGE = ("transformers.js", "optimum-onnx", "optimum-onnx, any widths")
"""Of environments that `make test-large` installs."""


@cache
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == render(results())


def test_the_text_has_what_tokenizers_part_over() -> None:
    whole = "".join(passages())
    assert "  " in whole
    assert "\n" in whole
    assert any(c.isdigit() for c in whole)
    assert any(c.isalpha() and not c.isascii() for c in whole)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An exported folder by its cell, written once."""
    return cache(lambda named: export_cell(cell(named), tmp_path_factory.mktemp("cell")))


def tried(name: str, named: str, folder: Path) -> Outcome:
    return try_onnx(cell(named), folder, RUNTIMES[name].ask, passages())


def need(name: str) -> None:
    if RUNTIMES[name].version() is None:
        pytest.skip(f"{name} is not installed: `make test` or `make test-large` does, where it can")


@pytest.mark.parametrize("named", ONNX)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.large) if n in LARGE else n for n in RUNTIMES]
)
def test_a_cell_is_as_the_page_has_it(name: str, named: str, folders: Any) -> None:
    need(name)
    recorded = results()["runtimes"][name]["cells"].get(named)
    if recorded is None:
        assert cell(named).flavour not in RUNTIMES[name].flavours
        return
    outcome = tried(name, named, folders(named))
    assert outcome.good == Outcome(**recorded).good, outcome.says


@pytest.mark.parametrize("named", PAIRS)
@pytest.mark.parametrize("name", ["ONNX Runtime, Python", "onnxruntime-genai", "OpenVINO"])
def test_heads_of_fewer_dimensions(name: str, named: str, folders: Any) -> None:
    need(name)
    outcome = tried(name, named, folders(named))
    assert outcome.good, outcome.says


@pytest.mark.parametrize("named", ["llama/gguf/per-layer/int4", "gemma3/gguf/uniform/fp32"])
def test_llama_cpp(named: str) -> None:
    if node_folder() is None:
        pytest.skip("node-llama-cpp is not installed: `make test` does where npm is at hand")
    assert cell(named).flavour == GGUF
    outcome = try_gguf(cell(named), passages())
    assert outcome.good == Outcome(**results()["runtimes"][LLAMA_CPP]["cells"][named]).good


@pytest.mark.parametrize(("ids", "tokens", "says"), [
    ([[5, 6]], None, "no: other ids"), (None, [[0] * 12], "no: a token that it takes lies"),
])  # fmt: skip
def test_other_ids_and_other_tokens_are_told(
    ids: Any, tokens: Any, says: str, folders: Any
) -> None:
    """Of a runtime whose tokenizer, or whose arithmetic, is another one."""
    named, texts = "qwen3/standard/uniform/int4", passages()[:1]
    plain = RUNTIMES["ONNX Runtime, Python"].ask(folders(named), texts)
    changed = replace(plain, ids=ids or plain.ids, tokens=tokens or plain.tokens)
    outcome = try_onnx(cell(named), folders(named), lambda *_: changed, texts)
    assert outcome.says.startswith(says)
