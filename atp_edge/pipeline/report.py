"""The run as one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from atp_edge.config import Config
from atp_edge.gate.outputs import rows_of as gate_rows
from atp_edge.model.plan import Plan, read_plan
from atp_edge.pipeline.summary import of_batch, rows_of
from atp_edge.pipeline.verdict import verdict_of
from atp_edge.run.files import read_json, write_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.run.history import Record, read_history
from atp_edge.run.progress import Progress
from atp_edge.run.records import STAGES

DENSE, SLIM, TARGET = "#8a94a6", "#0f8b8d", "#d1495b"
SMOOTHING_STEPS = 8


def report(config: Config, run: RunFolder, progress: Progress) -> None:
    """metrics.json, history and plan -> report.html."""
    stale = run.stale()
    for name, why in stale.items():
        progress.say(f"the figures of {name} are of other files than there are now: {why}")
    write_report(run.path, stale)


def write_report(run: Path, stale: Mapping[str, str] | None = None) -> Path:
    """Write run/report.html from the run's metrics, history and plan; stages not run are named.

    stale: stages whose figures no longer hold, and why.
    """
    metrics = read_json(run / "metrics.json")
    history = read_history(run)
    plan = read_plan(run / "plan.json") if (run / "plan.json").exists() else None
    figures = {
        "Loss": loss_figure(history),
        "Kept share of the decoder against the budget": kept_figure(history, metrics),
        "Churn of the decision": churn_figure(history),
        "Width of every layer": width_figure(plan) if plan else None,
        "Latency and memory": bench_figure(metrics),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    config = run / "config.toml"
    page = environment.get_template("report.html.jinja").render(
        verdict=verdict_of(metrics),
        cards=cards(metrics),
        rows=rows_of(metrics),
        figures={name: _html(figure) for name, figure in figures.items() if figure is not None},
        gate=metrics.get("gate"),
        gate_rows=gate_rows(metrics.get("gate", {}).get("checks", [])),
        missing=[s for s in STAGES[:-1] if s not in metrics],
        stale=stale or {},
        metrics=metrics,
        environment=metrics.get("bench", {}).get("environment", {}),
        config=config.read_text() if config.exists() else "",
        plotly_js=get_plotlyjs(),
    )
    path = run / "report.html"
    write_atomically(path, page)
    return path


def cards(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it says) for the top of the page."""
    found = []
    if "shrink" in metrics:
        kept = metrics["shrink"]
        whole = f"of the decoder's parameters kept ({kept['whole_share']:.1%} of the model's)"
        found.append((f"{kept['decoder_share']:.1%}", whole))
    if "shrink" in metrics and "train" in metrics:
        recovery = metrics["train"]["dense_tuned_perplexity"] / metrics["shrink"]["perplexity"]
        found.append((f"{recovery:.1%}", "of the dense tuned perplexity recovered"))
    if "bench" in metrics:
        ratios, of = metrics["bench"]["ratios"], of_batch(metrics)
        found.append((f"{ratios['token_ms_p50']:.2f}×", f"the dense speed per token{of}"))
        first = f"the dense speed to the first token{of}"
        found.append((f"{ratios['first_token_ms']:.2f}×", first))
    if "verify" in metrics:
        # Of several execution providers, the one that failed or erred most speaks for all.
        proofs = metrics["verify"]["providers"].values()
        proof = max(proofs, key=lambda p: (not p["passed"], p["logits_max_error"]))
        same = f"{proof['greedy_same']}/{proof['greedy_total']}"
        worst = f"continuations equal to PyTorch's, logits within {proof['logits_max_error']:.1e}"
        found.append((same, worst if proof["passed"] else f"FAILED: {worst}"))
    return found


def _html(figure: go.Figure) -> str:
    figure.update_layout(
        height=320,
        margin={"l": 56, "r": 16, "t": 52, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7a8496"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.15,
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.2)", zeroline=False)
    page: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False}
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
