"""The masked SwiGLU: its rivals are right, and one that cannot run is named."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest
import torch
from atp_bench.kernels import swiglu
from atp_bench.kernels.swiglu import SwigluCase
from atp_bench.kernels.tables import swiglu_table
from atp_kernels import reference
from rich.console import Console

SWIGLU = SwigluCase(channels=40, tokens=24, dtype="fp32")


def bench_swiglu_of(case: SwigluCase) -> dict[str, Any]:
    return swiglu.bench_swiglu(case, rounds=2, device="cpu", compiled=False)


def test_swiglu_is_right_and_an_absent_rival_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench_swiglu_of(SWIGLU)
    assert measured["rows"].keys() == {"torch", "ours"}
    for row in measured["rows"].values():
        assert row["error"] < 1e-5
        assert row["speedup"] > 0
    for found, reason in ((None, "not installed: pip install liger-kernel"), (1, "needs a GPU")):
        monkeypatch.setattr(swiglu.importlib.util, "find_spec", lambda name, found=found: found)
        console = Console(width=80, file=io.StringIO())
        console.print(swiglu_table(bench_swiglu_of(SWIGLU)))
        said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert "Liger's SwiGLU, then the mask: " + reason.split()[0] in said


class Overwrites(torch.autograd.Function):
    """As Liger does: the gradients are written over what was given."""

    @staticmethod
    def forward(ctx: Any, e: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.given = e, u
        return torch.nn.functional.silu(e) * u

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        e, u = (t.detach() for t in ctx.given)
        both, _, _ = reference.masked_swiglu_backward(gradients[0], e, u, None)
        de, du = both.chunk(2, -1)
        return e.copy_(de), u.copy_(du)


def test_liger_is_a_rival_where_it_runs_and_spoils_no_ones_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_swiglu = Overwrites.apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    monkeypatch.setattr(swiglu, "liger_absent", lambda device: None)
    measured = bench_swiglu_of(SWIGLU)
    assert measured["absent"] == {}
    assert measured["rows"].keys() == {"torch", "ours", swiglu.LIGER}
    for name, row in measured["rows"].items():
        assert row["error"] < 1e-5, name
    monkeypatch.setattr(module, "liger_swiglu", lambda e, u: 1.01 * Overwrites.apply(e, u))
    rows = bench_swiglu_of(SWIGLU)["rows"]
    assert rows[swiglu.LIGER]["speedup"] is None
    assert rows["ours"]["speedup"] > 0
