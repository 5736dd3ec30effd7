"""What `atp-edge bench training` and `bench kernels` show: tables, and the roofline as a page."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from rich.table import Table


def table(precision: str, rows: dict[str, Any], *, equal: bool) -> Table:
    """A row a variant of the LoRA step; ratios only where the gradients are equal."""
    shown = Table(
        title=f"LoRA step, {precision}: ms, over all kept, and the quartiles of that",
        title_justify="left",
    )
    shown.add_column("variant", overflow="fold")
    for name in ("layers", "ratio", "quartiles", "step", "ratio", "quartiles"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        shown.add_row(
            name, *_cells(row, "decoder_step", equal=equal), *_cells(row, "lora_step", equal=equal)
        )
    return shown


def _cells(row: dict[str, Any], step: str, *, equal: bool) -> tuple[str, str, str]:
    ms = f"{row[f'{step}_ms']:.0f}"
    if not equal:
        return ms, "-", "-"
    low, high = row[f"{step}_ratio_quartiles"]
    return ms, f"{row[f'{step}_ratio']:.2f}", f"{low:.2f}-{high:.2f}"


def kernels_table(measured: dict[str, Any]) -> Table:
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


def roofline(figures: dict[str, Any]) -> str:
    """One HTML page: rate against operations a byte, under this machine's two roofs."""
    figure = go.Figure()
    intensities = [measured["intensity"] for measured in figures["cases"]]
    top, slope = figures["roofs"]["flops_per_s"], figures["roofs"]["bytes_per_s"]
    low, knee, high = min([1.0, *intensities]), top / slope, 2 * max(*intensities, top / slope)
    figure.add_scatter(
        x=[low, knee, high],
        y=[low * slope, top, top],
        mode="lines",
        name="roof (measured)",
        line={"color": "#8a94a6", "dash": "dash"},
    )
    for name in figures["cases"][0]["rows"]:
        found = [m for m in figures["cases"] if m["rows"][name]["flops_per_s"] is not None]
        figure.add_scatter(
            x=[m["intensity"] for m in found],
            y=[m["rows"][name]["flops_per_s"] for m in found],
            text=["{in_features} -> {out_features}, {kept:.0%} kept".format(**m["case"])
                  for m in found],
            mode="markers", name=name,
        )  # fmt: skip
    figure.update_xaxes(type="log", title="operations a byte (kept rows)")
    figure.update_yaxes(type="log", title="useful operations a second")
    settings = figures["settings"]
    figure.update_layout(
        title=f"Masked LoRA, forward and backward, {settings['dtype']} on {settings['device']}",
        template="plotly_white",
    )
    return figure.to_html(include_plotlyjs=True)
