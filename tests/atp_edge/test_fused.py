"""The training core on Triton: fused_cases.py, in processes of their own: one whose Triton is
interpreted, and one on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["in the interpreter", "on a GPU"])
def test_cases(interpreted: str) -> None:
    if interpreted == "0" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cases = Path(__file__).with_name("fused_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": interpreted, "ATP_KERNELS": "triton"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
