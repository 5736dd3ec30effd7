"""The run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from atp_edge.config import Config
from atp_edge.gate.outputs import rows_of as gate_rows
from atp_edge.gate.results import judged_by
from atp_edge.model.plan import read_plan
from atp_edge.pipeline.model_card_use import how_to_use
from atp_edge.pipeline.report_facts import (
    about,
    layers_of,
    slices_of,
    times_of,
    training_facts,
)
from atp_edge.pipeline.report_figures import (
    bench_figure,
    churn_figure,
    html_of,
    kept_figure,
    loss_figure,
    quality_figure,
    width_figure,
)
from atp_edge.pipeline.samples import add_samples
from atp_edge.pipeline.shipped_quality import shipped_perplexity
from atp_edge.pipeline.summary import of_batch, rows_of
from atp_edge.pipeline.verdict import verdict_of
from atp_edge.run.files import read_json, write_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.run.history import read_history
from atp_edge.run.progress import Progress
from atp_edge.run.records import STAGES


def report(config: Config, run: RunFolder, progress: Progress) -> None:
    """metrics.json, history and plan -> report.html."""
    stale = run.stale()
    for name, why in stale.items():
        progress.say(f"the figures of {name} are of other files than there are now: {why}")
    add_samples(config, run, progress)
    write_report(run.path, stale)


def write_report(run: Path, stale: Mapping[str, str] | None = None) -> Path:
    """Write run/report.html from the run's metrics, history and plan; stages not run are named.

    stale: stages whose figures no longer hold, and why.
    """
    metrics = read_json(run / "metrics.json")
    history = read_history(run)
    plan = read_plan(run / "plan.json") if (run / "plan.json").exists() else None
    figures = {
        "Quality against size": quality_figure(metrics),
        "Latency and memory": bench_figure(metrics),
        "Width of every layer": width_figure(plan) if plan else None,
    }
    diagnostics = {
        "Loss": loss_figure(history),
        "Kept share of the decoder against the budget": kept_figure(history, metrics),
        "Churn of the decision": churn_figure(history),
    }
    config, gate = run / "config.toml", metrics.get("gate", {})
    changed = gate.get("changed", [])
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            verdict=verdict_of(metrics, stale or ()),
            about=about(run, metrics),
            cards=cards(metrics),
            rows=rows_of(metrics),
            figures=_drawn(figures),
            diagnostics=_drawn(diagnostics),
            samples=metrics.get("samples", {}),
            slices=slices_of(metrics),
            layers=layers_of(run, plan),
            times=times_of(metrics),
            use=how_to_use() if (run / "onnx").is_dir() else [],
            gate=gate,
            gate_by=judged_by(gate["profile"], changed) if gate else "",
            gate_changed=changed,
            gate_rows=gate_rows(gate.get("checks", [])),
            missing=[s for s in STAGES[:-1] if s not in metrics],
            stale=stale or {},
            metrics=metrics,
            facts=training_facts(metrics),
            environment=metrics.get("bench", {}).get("environment", {}),
            config=config.read_text() if config.exists() else "",
            plotly_js=get_plotlyjs(),
        )
    )
    path = run / "report.html"
    write_atomically(path, page)
    return path


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _drawn(figures: dict[str, go.Figure | None]) -> dict[str, str]:
    return {name: html_of(figure) for name, figure in figures.items() if figure is not None}


def cards(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it says) for the top of the page."""
    found = []
    if "shrink" in metrics:
        kept = metrics["shrink"]
        whole = f"of the decoder's parameters kept ({kept['whole_share']:.1%} of the model's)"
        found.append((f"{kept['decoder_share']:.1%}", whole))
    if "shrink" in metrics and "train" in metrics:
        recovery = metrics["train"]["dense_tuned_perplexity"] / shipped_perplexity(metrics)
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
