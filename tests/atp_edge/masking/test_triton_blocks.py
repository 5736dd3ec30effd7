"""The training core on Triton: triton_blocks_cases.py, and fused beside joined products."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton_process import both_ways, run_cases

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")


@both_ways
def test_cases(interpreted: str) -> None:
    run_cases(Path(__file__).with_name("triton_blocks_cases.py"), interpreted=interpreted)


@pytest.mark.large
@both_ways
def test_large_cases(interpreted: str) -> None:
    file = Path(__file__).with_name("triton_blocks_cases.py")
    run_cases(file, interpreted=interpreted, marked="large")


@both_ways
def test_fused_layers(interpreted: str) -> None:
    file = Path(__file__).with_name("fused_layers_cases.py")
    run_cases(file, interpreted=interpreted, kernels="joined")
