"""Attention on a CPU: ours keeps no scores, and what is wrong has no speed."""

from __future__ import annotations

import io
from typing import Any

import pytest
from atp_bench.kernels import attention
from atp_bench.kernels.attention import AttentionCase
from atp_bench.kernels.tables import attention_table
from rich.console import Console


def test_attention_keeps_no_scores_and_a_wrong_rival_gets_no_speedup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = AttentionCase(heads=4, groups=2, size=8, tokens=200, dtype="fp32")

    def measured() -> dict[str, Any]:
        return attention.bench_attention(case, rounds=1)

    found = measured()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(attention_table(found))
    assert "4 heads of 8 on 2, 200 tokens" in console.export_text()
    for name, row in found["rows"].items():
        assert row["error"] < 1e-5, name
        assert row["speedup"] > 0
    inputs_bytes = (4 + 2 + 2) * 200 * 8 * 4
    ours, eager = (found["rows"][n]["memory_bytes"] for n in ("ours", "transformers, eager"))
    assert ours <= 2 * inputs_bytes < 4 * 200 * 200 * 4 <= eager
    right = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *a, **k: 1.01 * right(*a, **k))
    assert measured()["rows"]["ours"]["speedup"] is None
