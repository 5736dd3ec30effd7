"""The training core on Triton: fused_cases.py, in a process whose Triton is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")


def test_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("fused_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "ATP_KERNELS": "triton"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
