"""The training core on Triton: triton_blocks_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton_process import both_ways, run_cases

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")


@both_ways
def test_cases(interpreted: str) -> None:
    run_cases(Path(__file__).with_name("triton_blocks_cases.py"), interpreted)
