"""The plots of the report page."""

from __future__ import annotations

import itertools
from typing import Any

import plotly.graph_objects as go

from atp_edge.model.plan import Plan
from atp_edge.pipeline.summary import of_batch
from atp_edge.run.history import Record

UNTOUCHED, DENSE, SLIM, TARGET = "#b07aa1", "#8a94a6", "#0f8b8d", "#d1495b"
SMOOTHING_STEPS = 8


def html_of(figure: go.Figure) -> str:
    """A plot as wide as its place, in colours that light and dark pages can show."""
    figure.update_layout(
        height=320,
        autosize=True,
        margin={"l": 8, "r": 8, "t": 48, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7a8496"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.15,
    )
    grid = {"gridcolor": "rgba(128,128,128,.2)", "zeroline": False, "automargin": True}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    page: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
    return page


def _mean_of_last(values: list[float]) -> list[float]:
    """A running mean over SMOOTHING_STEPS steps."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = [max(0, i + 1 - SMOOTHING_STEPS) for i in range(len(values))]
    return [(sums[i + 1] - sums[s]) / (i + 1 - s) for i, s in enumerate(starts)]


def _line(figure: go.Figure, records: list[Record], values: list[Any], **style: Any) -> None:
    steps = [r.step + 1 for r in records]
    figure.add_scatter(x=steps, y=values, mode="lines", **style)


def loss_figure(history: list[Record]) -> go.Figure | None:
    """Train loss of the dense baseline and of the slim model, and the decision's loss."""
    if not history:
        return None
    figure = go.Figure()
    dense = [r for r in history if r.phase == "dense"]
    slim = [r for r in history if r.phase != "dense"]
    decided = [r for r in slim if r.decision_loss is not None]
    if dense:
        _line(figure, dense, _mean_of_last([r.loss for r in dense]), name="dense baseline",
              line={"color": DENSE})  # fmt: skip
    _line(figure, slim, _mean_of_last([r.loss for r in slim]), name="slim (LoRA steps)",
          line={"color": SLIM})  # fmt: skip
    losses = [r.decision_loss or 0.0 for r in decided]
    _line(figure, decided, _mean_of_last(losses), name="decision split",
          line={"color": TARGET, "dash": "dot"})  # fmt: skip
    validated = [r for r in slim if r.validation_loss is not None]
    if validated:
        figure.add_scatter(x=[r.step + 1 for r in validated],
                           y=[r.validation_loss for r in validated], mode="markers",
                           name="validation", marker={"color": TARGET, "size": 8})  # fmt: skip
    recovery = [r.step for r in slim if r.phase == "recovery"]
    if recovery:
        figure.add_vline(x=recovery[0], line_dash="dash", line_color=DENSE,
                         annotation_text="decision frozen",
                         annotation_position="bottom right")  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=f"loss (mean of {SMOOTHING_STEPS})", type="log")
    return figure


def kept_figure(history: list[Record], metrics: dict[str, Any]) -> go.Figure | None:
    """Share kept by the projected decision and by the raw one, with the budget."""
    hard = [r for r in history if r.kept_share is not None]
    soft = [r for r in history if r.soft_share is not None]
    if not hard:
        return None
    figure = go.Figure()
    _line(figure, hard, [r.kept_share for r in hard], name="kept", line={"color": SLIM})
    _line(figure, soft, [r.soft_share for r in soft], name="before projection",
          line={"color": DENSE})  # fmt: skip
    if "train" in metrics:
        share = metrics["train"]["decoder_share"]
        figure.add_hline(y=share, line_dash="dot", line_color=TARGET, annotation_text="final")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="share of decoder", range=[0, 1.02])
    return figure


def churn_figure(history: list[Record]) -> go.Figure | None:
    """Share of structures that changed sides at each generator step."""
    changed = [r for r in history if r.churn is not None]
    if not changed:
        return None
    figure = go.Figure()
    figure.add_bar(
        x=[r.step + 1 for r in changed], y=[100 * (r.churn or 0) for r in changed],
        marker_color=SLIM,
    )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="% of structures")
    return figure


def width_figure(plan: Plan) -> go.Figure:
    """Kept share of every attention and MLP, layer by layer."""
    figure = go.Figure()
    for kind, color in (("attention", DENSE), ("mlp", SLIM)):
        sites = [s for s in plan.sites if s.kind == kind]
        figure.add_bar(
            x=[s.layer for s in sites],
            y=[100 * s.width / s.size for s in sites],
            customdata=[f"{s.width} of {s.size}" for s in sites],
            hovertemplate="layer %{x}: %{customdata}",
            name=kind,
            marker_color=color,
        )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="% kept", range=[0, 102])
    return figure


def bench_figure(metrics: dict[str, Any]) -> go.Figure | None:
    """Latency, memory and file, relative to the dense model."""
    if "bench" not in metrics:
        return None
    rows = metrics["bench"]["rows"]
    names = {"first_token_ms": "first token", "token_ms_p50": "per token p50",
             "token_ms_p95": "per token p95", "load_ms": "load",
             "peak_memory_bytes": "peak memory", "file_bytes": "file"}  # fmt: skip
    figure = go.Figure()
    for model, color in (("dense", DENSE), ("slim", SLIM)):
        figure.add_bar(
            y=[100 * rows[model][key] / rows["dense"][key] for key in names],
            x=list(names.values()),
            name=model,
            marker_color=color,
        )
    figure.update_yaxes(title=f"% of dense{of_batch(metrics)} (less is better)")
    return figure


def quality_figure(metrics: dict[str, Any]) -> go.Figure | None:
    """Perplexity against the ONNX file's size: dense tuned, slim, and what it was rounded to."""
    points = quality_points(metrics)
    if len(points) < 2:
        return None
    figure, largest = go.Figure(), max(megabytes for _, megabytes, _ in points)
    for i, (name, megabytes, perplexity) in enumerate(sorted(points, key=lambda x: x[1])):
        # Neighbours' names do not cover each other, and none leaves the plot.
        above, side = ("top", "bottom")[i % 2], "right" if megabytes < largest / 2 else "left"
        figure.add_scatter(
            x=[megabytes], y=[perplexity], mode="markers+text", text=[name], name=name,
            textposition=f"{above} {side}", showlegend=False, cliponaxis=False,
            hovertemplate=f"{name}: %{{x:.0f}} MB, perplexity %{{y:.2f}}<extra></extra>",
            marker={"size": 12, "color": DENSE if name.startswith("dense") else SLIM},
        )  # fmt: skip
    if "train" in metrics:
        figure.add_hline(y=metrics["train"]["untuned_perplexity"], line_dash="dash",
                         line_color=UNTOUCHED, annotation_text="untouched model")  # fmt: skip
    figure.update_xaxes(title="ONNX file, MB", rangemode="tozero")
    figure.update_yaxes(title="perplexity, lower is better")
    return figure


def quality_points(metrics: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, MB, perplexity) of every form whose file was written and measured."""
    if not {"train", "shrink", "export"} <= metrics.keys():
        return []
    export, slim = metrics["export"], metrics["shrink"]["perplexity"]
    rounded = metrics.get("verify", {}).get("quality", {})
    precision = export["precision"]
    points = []
    if "dense" in export:
        tuned = metrics["train"]["dense_tuned_perplexity"]
        points.append((f"dense {precision}", export["dense"]["onnx_bytes"] / 1e6, tuned))
    shown = rounded.get("onnx_perplexity", slim)
    points.append((f"slim {precision}", export["slim"]["onnx_bytes"] / 1e6, shown))
    for row in metrics.get("rounding", {}).get("rows", []):
        name = f"slim {row['precision']} {row['quantizer']}"
        points.append((name, row["onnx_bytes"] / 1e6, row["onnx_perplexity"]))
    return points
