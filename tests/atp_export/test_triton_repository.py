"""What examples/triton_repository.py writes: its layout, and what it says of the model."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tests.atp_edge.pipeline.test_runs_of_before import STORED

EXAMPLE = Path(__file__).parents[2] / "examples" / "triton_repository.py"
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


def example() -> Any:
    spec = importlib.util.spec_from_file_location("triton_repository", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_repository_says_what_the_model_takes_and_gives(tmp_path: Path) -> None:
    shutil.copytree(STORED / "finished" / "onnx", tmp_path / "onnx")
    written = example().write_repository(tmp_path / "onnx", tmp_path / "models", "notes")
    # The layout of Triton's model_repository.md: NAME/config.pbtxt, NAME/1/model.onnx.
    assert sorted(p.name for p in written.iterdir()) == ["1", "config.pbtxt"]
    session = ort.InferenceSession(str(written / "1" / "model.onnx"))
    text = (written / "config.pbtxt").read_text()
    assert text.startswith('name: "notes"\nbackend: "onnxruntime"\nmax_batch_size: 0\n')
    said = re.findall(r'name: "(\S+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]', text)
    told = [(name, kind, [int(d) for d in dims.split(",")]) for name, kind, dims in said]
    assert told == [
        (x.name, TYPES[x.type], [d if isinstance(d, int) else -1 for d in x.shape])
        for x in (*session.get_inputs(), *session.get_outputs())
    ]
    with pytest.raises(FileExistsError):
        example().write_repository(tmp_path / "onnx", tmp_path / "models", "notes")
