"""A model of real size through the whole product."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from atp_edge.data.domains import legal_texts
from tests.synthetic import LLAMA_1B, synthetic_checkpoint
from tests.tiny import QUICK_GATE, save_texts

SETTINGS = [
    "--steps", "4", "--export-precision", "int4", "--export-quantizer", "nearest",
    "--dataset-block-tokens", "64", "--dataset-test-blocks", "4",
    "--decision-importance-blocks", "2", "--recovery-reconstruct-blocks", "0",
    "--recovery-approach-blocks", "2", "--bench-rounds", "1", "--bench-prompt-tokens", "16",
    "--bench-new-tokens", "8", "--gate-config", QUICK_GATE,
]  # fmt: skip
RUN = """
import json, resource, sys
from atp_edge.cli import main
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
peaks = [resource.getrusage(who).ru_maxrss * 1024
         for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"code": code, "peak": max(peaks)}))
"""


def run_of(folder: Path, sizes: dict[str, Any], real_folder: Path, *more: str) -> dict[str, Any]:
    """A whole run of a synthetic model; its exit code and the peak of its memory in bytes."""
    synthetic_checkpoint(folder / "model", sizes, AutoTokenizer.from_pretrained(real_folder))
    save_texts(folder / "data.jsonl", (text[:2500] for text, _ in legal_texts()[:60]))
    done = subprocess.run(
        [sys.executable, "-c", RUN, "run", "--model", str(folder / "model"), "--data",
         str(folder / "data.jsonl"), "--out", str(folder / "run"), *SETTINGS, *more],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return found


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_a_model_of_1_2_billion_goes_through_in_24_gigabytes(
    tmp_path: Path, real_folder: Path
) -> None:
    found = run_of(tmp_path, LLAMA_1B, real_folder)
    assert found["peak"] <= 24e9
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(proof["passed"] for proof in metrics["verify"]["providers"].values())
