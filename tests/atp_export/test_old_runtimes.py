"""Exported files in the oldest runtimes that are said to compute them rightly, and in those that do
not: environments of their own (`make test-large`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atp_export.export import RUNTIMES, export_onnx
from atp_export.runtime import Generation, Session

from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model

pytestmark = pytest.mark.large
IDS = [5, 3, 20, 34, 17, 9, 43, 77, 31, 12, 15, 8]
_LOGITS = """
import json, sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids, inputs = [json.loads(sys.argv[2])], {i.name: i.shape for i in session.get_inputs()}
past = {n: s for n, s in inputs.items() if n.startswith("past_key_values.")}
feed = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in past.items()}
feed.update(input_ids=np.array(ids), attention_mask=np.ones_like(ids))
if "position_ids" in inputs:
    feed["position_ids"] = np.arange(len(ids[0]))[None]
print(json.dumps(session.run(["logits"], feed)[0][0].tolist()))
"""


def runtime(version: str) -> str:
    """The interpreter of an environment with this onnxruntime."""
    folder = os.environ.get("ATP_ONNXRUNTIMES")
    if folder is None:
        pytest.skip("environments of their own: `make test-large` builds them")
    return str(Path(folder) / f"onnxruntime-{version}" / "bin" / "python")


def asked(version: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [runtime(version), "-c", _LOGITS, str(folder / "model.onnx"), json.dumps(IDS)],
        capture_output=True,
        text=True,
        check=False,
    )


def windowed(root: Path, **options: Any) -> Path:
    """A model whose layers see 4 tokens."""
    model = tiny_model("mistral")
    model.config.sliding_window = 4
    save_narrow(model, None, root / "slim")
    export_onnx(root / "slim", root / "onnx", **options)
    return root / "onnx"


RIGHT = [
    ("1.17.3", "portable", "fp32"),
    ("1.20.1", "portable", "int4"),
    ("1.23.2", "standard", "fp32"),
    ("1.23.2", "standard", "int4"),
    ("1.24.1", "ort", "fp32"),
    ("1.24.1", "ort", "int4"),
]


@pytest.mark.parametrize(("version", "flavour", "precision"), RIGHT)
def test_the_oldest_runtime_that_is_said_to_compute_it_rightly_does(
    tmp_path: Path, version: str, flavour: Any, precision: Any
) -> None:
    kind = "quantized" if precision == "int4" else "plain"
    assert version.startswith(RUNTIMES[flavour][kind])
    folder = windowed(tmp_path, flavour=flavour, precision=precision)
    done = asked(version, folder)
    assert done.returncode == 0, done.stderr
    ours = Generation(Session(folder), 1, len(IDS)).step(np.array([IDS]))[0]
    error = np.abs(np.array(json.loads(done.stdout)) - ours).max()
    assert error < (1e-4 if precision == "fp32" else 0.05 * ours.std())


def test_a_runtime_that_would_read_the_window_otherwise_does_not_open_the_file(
    tmp_path: Path,
) -> None:
    done = asked("1.23.2", windowed(tmp_path, flavour="ort"))
    assert done.returncode != 0
    assert "official support for domain ai.onnx is till opset 23" in done.stderr
