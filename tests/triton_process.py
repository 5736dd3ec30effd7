"""Cases on Triton run in processes of their own, in its interpreter and on a GPU: TRITON_INTERPRET
must be set before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Of the process of the cases.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

both_ways = pytest.mark.parametrize(
    "interpreted", ["1", "0"], ids=["in the interpreter", "on a GPU"]
)


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in this environment and what is added to it."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def run_cases(
    *files: Path, interpreted: str, kernels: str = "triton", marked: str = "not large"
) -> None:
    """Every case of the files so marked, in one process; skips those for a GPU where there is
    none."""
    if interpreted == "0" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run(
        ["-m", "pytest", "-q", "-m", marked, *map(str, files)],
        TRITON_INTERPRET=interpreted,
        ATP_KERNELS=kernels,
    )
    assert done.returncode == 0, done.stdout[-4000:]
