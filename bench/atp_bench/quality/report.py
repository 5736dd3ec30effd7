"""What `atp-edge bench quality` shows: a table for the terminal, and one page of plots."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from rich.table import Table

from atp_bench.quality.results import Summary

FIRST, REST = "#0f8b8d", "#8a94a6"


def table(summaries: Sequence[Summary]) -> Table:
    """One row a method, at 80 columns; recoveries over seeds as lowest to highest."""
    shown = Table(title="perplexity on the test split, equal tokens", title_justify="left")
    shown.add_column("cell", overflow="fold")
    shown.add_column("method", overflow="fold")
    for name in ("seeds", "dense", "slim", "recovery", "tasks"):
        shown.add_column(name, justify="right", no_wrap=True)
    last = ""
    for s in summaries:
        cell = f"{s.domain} {1 - s.share:.0%} cut, {s.widths}, {s.steps} steps"
        low, high = s.recovery_spread
        spread = f"{s.recovery:.3f}" if s.seeds == 1 else f"{low:.3f} to {high:.3f}"
        shown.add_row("" if cell == last else cell, s.method, str(s.seeds),
                      f"{s.dense_perplexity:.2f}", f"{s.perplexity:.2f}", spread,
                      f"{s.task_recovery:.2f}")  # fmt: skip
        last = cell
    return shown


def markdown(summaries: Sequence[Summary]) -> str:
    """The same rows for a document; the whole-model share beside the decoder's."""
    head = (
        "| domain | kept of decoder (of whole) | widths | steps | method | seeds | dense | slim "
        "| recovery | tasks |\n|---|---|---|---:|---|---:|---:|---:|---:|---:|\n"
    )
    rows = [
        f"| {s.domain} | {s.share:.0%} ({s.whole_share:.1%}) | {s.widths} | {s.steps} | {s.method} "
        f"| {s.seeds} | {s.dense_perplexity:.2f} | {s.perplexity:.2f} | {_spread(s)} "
        f"| {s.task_recovery:.3f} |\n"
        for s in summaries
    ]
    return head + "".join(rows)


def _spread(s: Summary) -> str:
    if s.seeds == 1:
        return f"{s.recovery:.3f}"
    return f"{s.recovery:.3f} ({s.recovery_spread[0]:.3f} to {s.recovery_spread[1]:.3f})"


def page(summaries: Sequence[Summary]) -> str:
    """One self-contained HTML page: recovery by method, and recovery against tokens."""
    figures = [_methods(summaries), _steps(summaries)]
    parts = [
        f.to_html(full_html=False, include_plotlyjs=i == 0)
        for i, f in enumerate(f for f in figures if f is not None)
    ]
    return (
        '<!doctype html><meta charset="utf-8"><title>atp-edge bench quality</title>'
        '<body style="max-width:60rem;margin:2rem auto;font-family:system-ui,sans-serif">'
        f"<h1>Recovery at equal tokens</h1>{''.join(parts)}</body>"
    )


def _methods(summaries: Sequence[Summary]) -> go.Figure:
    figure = go.Figure()
    for domain in dict.fromkeys(s.domain for s in summaries):
        rows = [s for s in summaries if s.domain == domain]
        figure.add_bar(
            y=[f"{s.method} · {1 - s.share:.0%} cut · {s.widths} · {s.steps}" for s in rows],
            x=[s.recovery for s in rows],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [s.recovery_spread[1] - s.recovery for s in rows],
                "arrayminus": [s.recovery - s.recovery_spread[0] for s in rows],
            },
            orientation="h",
            name=domain,
            marker_color=[FIRST if s.method == "atp" else REST for s in rows],
        )
    figure.update_layout(
        title="Recovery by method (dense / slim perplexity; whiskers: lowest and highest seed)",
        height=160 + 26 * len(summaries),
        margin={"l": 320},
        showlegend=False,
    )
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(autorange="reversed")
    return figure


def _steps(summaries: Sequence[Summary]) -> go.Figure | None:
    """Recovery of ATP against training steps, where it ran at more than one length."""
    figure = go.Figure()
    for domain, share in dict.fromkeys((s.domain, s.share) for s in summaries):
        rows = sorted(
            (s for s in summaries
             if (s.domain, s.share, s.method, s.widths) == (domain, share, "atp", "per-layer")),
            key=lambda s: s.steps,
        )  # fmt: skip
        if len(rows) > 1:
            figure.add_scatter(
                x=[s.steps for s in rows],
                y=[s.recovery for s in rows],
                mode="lines+markers",
                name=f"{domain}, {1 - share:.0%} cut",
            )
    if not figure.data:
        return None
    figure.update_layout(title="Recovery against training steps")
    figure.update_xaxes(type="log", title="steps")
    figure.update_yaxes(range=[0, 1])
    return figure
