"""Triton without a GPU: the interpreter for meaning, ahead-of-time compilation for the targets.
With one, the interpreter's cases run there as well.

Each in a process of its own: what Triton reads from its environment is read at import.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.triton_process import both_ways, run, run_cases

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")

BUDGETS = Path(__file__).with_name("budgets.json")
# Its list stands on W's contiguous dimension: loads of two bytes, none asynchronous. It runs where
# ATP_KERNELS=triton alone.
SLOW = "gemm, down backward, fixed"
TARGETS = (80, 86, 89, 90, 100, 120)


@both_ways
def test_cases(interpreted: str) -> None:
    names = ("triton_cases.py", "fusion_cases.py")
    run_cases(*(Path(__file__).with_name(name) for name in names), interpreted=interpreted)


@pytest.mark.parametrize("capability", TARGETS)
def test_compiles_ahead_of_time_within_its_budget(tmp_path: Path, capability: int) -> None:
    """budgets.json: the figures of each kernel as committed. A worse one fails; for a better one,
    or a reasoned exception, run static_figures.py again and commit what it writes."""
    code = str(Path(__file__).with_name("static_figures.py"))
    done = run([code, str(capability)], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    budgets = json.loads(BUDGETS.read_text())[str(capability)]
    assert found.keys() == budgets.keys()
    for name, figures in found.items():
        budget = budgets[name]
        assert figures["spilled_bytes"] == 0, name
        # The smallest shared memory of the targets (sm_86, 89, 120): 99 KiB.
        assert figures["shared_bytes"] <= min(budget["shared_bytes"], 99 * 1024), name
        assert figures["registers"] <= budget["registers"], name
        if name.startswith("gemm"):
            # fp32 is computed as fp32, not rounded to tf32 for the tensor cores.
            assert (budget["tensor_core"] == "") == ("fp32" in name), name
            assert figures["tensor_core"] == budget["tensor_core"], name
            assert figures["loads_in_flight"] >= budget["loads_in_flight"], name
            assert budget["loads_in_flight"] > 0 or name == SLOW, name
            assert not figures["serialized"], name
