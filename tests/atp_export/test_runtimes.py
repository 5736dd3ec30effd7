"""docs/runtimes.md says what was run, and cells of it are run again."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.atp_export import runtimes

CELLS = [("ort", "per-layer", "int4"), ("standard", "per-layer", "fp32"),
         ("portable", "uniform", "fp16")]  # fmt: skip
PAIR_CELLS = [("ort", "per-layer pairs", "int4"), ("ort", "uniform pairs", "fp32"),
              ("standard", "per-layer pairs", "fp32")]  # fmt: skip


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads(runtimes.RESULTS.read_text())
    assert runtimes.PAGE.read_text() == runtimes.render(results)


def _recorded(runtime: str, cell: tuple[str, str, str]) -> str:
    results = json.loads(runtimes.RESULTS.read_text())
    outcome: str = results["runtimes"][runtime]["cells"]["/".join(cell)]
    return outcome


@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_plain_onnx_runtime(cell: tuple[str, str, str]) -> None:
    assert runtimes.attempt(runtimes.plain_python, *cell) == "yes"
    assert _recorded("ONNX Runtime, Python", cell) == "yes"


@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_onnxruntime_genai(cell: tuple[str, str, str]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    assert runtimes.attempt(runtimes.genai, *cell) == "yes"
    assert _recorded("onnxruntime-genai", cell) == "yes"


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="extra `peers` is not installed"
)
@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_openvino(cell: tuple[str, str, str]) -> None:
    assert runtimes.attempt(runtimes.openvino, *cell) == _recorded("OpenVINO", cell)


@pytest.mark.parametrize("cell", PAIR_CELLS, ids="/".join)
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime_genai", "openvino"])
def test_heads_of_fewer_dimensions(cell: tuple[str, str, str], runtime: str) -> None:
    pytest.importorskip(runtime, reason="extra `peers` is not installed")
    checks = {"onnxruntime": runtimes.plain_python, "onnxruntime_genai": runtimes.genai}
    assert runtimes.attempt(checks.get(runtime, runtimes.openvino), *cell) == "yes"


@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_onnxruntime_node(cell: tuple[str, str, str]) -> None:
    folder = Path(os.environ.get("ATP_NODE_FOLDER", "build/node"))
    if shutil.which("node") is None or not (folder / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip(
            "needs node, and onnxruntime-node under build/node or ATP_NODE_FOLDER: `make test` "
            "installs it there where npm is at hand"
        )
    assert runtimes.attempt(runtimes.node_in(folder), *cell) == "yes"
    assert _recorded("onnxruntime-node", cell) == "yes"


def test_optimum() -> None:
    python = os.environ.get("ATP_OPTIMUM_PYTHON")
    if python is None:
        pytest.skip(
            "optimum-onnx wants an older transformers than ours: set ATP_OPTIMUM_PYTHON to the "
            "interpreter of an environment that has it"
        )
    cell = ("standard", "uniform", "fp32")
    assert runtimes.attempt(runtimes.optimum_by(Path(python)), *cell) == _recorded(
        "optimum-onnx", cell
    )
