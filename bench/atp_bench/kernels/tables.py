"""What `atp-edge bench kernels` shows: a table a case."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def lora_table(measured: dict[str, Any]) -> Table:
    """A row a rival of one case; no speedup where the result is wrong."""
    case = measured["case"]
    shown = Table(
        title=f"{case['in_features']} -> {case['out_features']}, rank {case['rank']}, "
        f"{case['tokens']} tokens, {case['kept']:.0%} kept, {case['dtype']}",
        title_justify="left",
    )
    return _with_rows(shown, measured)


def swiglu_table(measured: dict[str, Any]) -> Table:
    """A row a rival of one SwiGLU; one that could not run is there, with the reason."""
    case = measured["case"]
    shown = Table(
        title=f"SwiGLU and mask, {case['channels']} channels, {case['tokens']} tokens, "
        f"{case['dtype']}",
        title_justify="left",
    )
    _with_rows(shown, measured)
    for name, reason in measured["absent"].items():
        shown.add_row(f"{name}: {reason}", "-", "-", "-", "-")
    return shown


def attention_table(measured: dict[str, Any]) -> Table:
    """A row a rival of one attention."""
    case = measured["case"]
    shown = Table(
        title=f"causal attention, {case['heads']} heads of {case['size']} on {case['groups']}, "
        f"{case['tokens']} tokens, {case['dtype']}",
        title_justify="left",
    )
    return _with_rows(shown, measured)


def _with_rows(shown: Table, measured: dict[str, Any]) -> Table:
    shown.add_column("layer", overflow="fold")
    for name in ("fwd, ms", "bwd, ms", "MB", "speedup"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in measured["rows"].items():
        wrong = f"wrong by {row['error']:.0e}"
        shown.add_row(name, f"{row['forward_ms']:.2f}", f"{row['backward_ms']:.2f}",
                      f"{row['memory_bytes'] / 1e6:.1f}",
                      wrong if row["speedup"] is None else f"{row['speedup']:.2f}")  # fmt: skip
    return shown
