"""examples/cpp/openvino, built and run: it generates the tokens that we do.

examples/cpp/onnxruntime is not built anywhere here: no package brings ONNX Runtime's headers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.atp_export.runtimes.ask import Answers, ids_of_the_folder
from tests.atp_export.runtimes.cells import (
    NEW_TOKENS,
    PRECISIONS,
    ROOT,
    WIDTHS,
    Cell,
    export_cell,
    passages,
)
from tests.atp_export.runtimes.judge import try_onnx

SOURCE = ROOT / "examples" / "cpp" / "openvino"
pytestmark = pytest.mark.large  # A minute of a C++ compiler.


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    openvino = pytest.importorskip("openvino")
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("build")
    beside = Path(openvino.__file__).parent / "cmake"
    subprocess.run(
        ["cmake", "-S", str(SOURCE), "-B", str(build), f"-DOpenVINO_DIR={beside}"], check=True
    )
    subprocess.run(["cmake", "--build", str(build)], check=True)
    return build / "generate"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_it_generates_our_tokens(
    tmp_path: Path, program: Path, widths: str, precision: str
) -> None:
    def ask(folder: Path, texts: Sequence[str]) -> Answers:
        ids = ids_of_the_folder(folder, texts)
        return Answers(ids=ids, tokens=[generated(program, folder, row) for row in ids])

    cell = Cell(family="llama", flavour="portable", widths=widths, precision=precision)
    outcome = try_onnx(cell, export_cell(cell, tmp_path), ask, passages())
    assert outcome.good, outcome.says


def generated(program: Path, folder: Path, ids: Sequence[int]) -> list[int]:
    asked = [str(program), str(folder), str(NEW_TOKENS), *map(str, ids)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)["tokens"]
    return found


def test_it_says_how_it_is_called(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: generate FOLDER")
