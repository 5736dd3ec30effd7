"""What `atp-edge bench quality` shows: a table for the terminal, a page of plots, a document."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from atp_bench.quality.ablations import ablations, ablations_markdown
from atp_bench.quality.acceptance import acceptance_markdown, criteria
from atp_bench.quality.cells import ABLATIONS
from atp_bench.quality.intervals import recovery_of
from atp_bench.quality.results import Result
from atp_bench.quality.summary import Summary, lead_cells, summarize

FIRST, REST = "#0f8b8d", "#8a94a6"


def tables(summaries: Iterable[Summary]) -> Iterator[Table]:
    """A table where something was measured, one row a method, at 80 columns; the 95 % interval
    under its recovery."""
    for where, rows in itertools.groupby(summaries, key=lambda s: s.where):
        shown = Table(title=f"perplexity: {where}", title_justify="left")
        shown.add_column("method", overflow="fold")
        for name in ("seeds", "dense", "slim", "recovery", "tasks"):
            shown.add_column(name, justify="right", no_wrap=True)
        for s in rows:
            recovery = f"{s.recovery.value:.3f}\n{s.recovery.interval_text}".strip()
            shown.add_row(s.method, str(s.seeds), f"{s.dense_perplexity:.2f}",
                          f"{s.perplexity:.2f}", recovery, f"{s.task_recovery:.2f}")  # fmt: skip
        yield shown


def document(results: Sequence[Result]) -> str:
    """A Markdown document: what is promised, every method's mean over seeds, recovery by tokens
    (Mermaid's plot, which GitHub draws), what each part buys, and what little text gives."""
    little = [r for r in results if r.cell.documents]
    results = [r for r in results if not r.cell.documents]
    summaries, curves = summarize(results), _curves(results)
    head = (
        "# Recovery, measured\n\n"
        "Written by `atp-edge bench quality --show --json FILE --report docs/quality.md` (`--json` "
        "once a machine); the cells with their seeds, tasks and intervals are there. Recovery: "
        "dense over slim perplexity on the test split. Tasks: slim over dense, the mean over the "
        "domain's tasks. Both against the dense model tuned by LoRA with the same tokens and rank; "
        "a lead, where ranks differ, against one of them. A promise is judged by its lowest value: "
        "of cells, and for tasks of domains, each over its seeds. What the methods are is in "
        "[recovery.md](recovery.md).\n\n"
    )
    parts = [head, acceptance_markdown(criteria(results)), "\n"]
    methods = [s for s in summaries if s.method not in ABLATIONS]
    for domain in dict.fromkeys(s.domain for s in methods):
        own = [s for s in methods if s.domain == domain]
        parts += [f"## {domain}\n\n", markdown(own), "\n"]
        parts += [_mermaid(c) for c in curves if c.domain == domain]
    made = ablations(summaries)
    if made:
        parts += ["## What each part buys\n\n", ablations_markdown(made)]
    if little:
        parts += ["## With little text\n\n", by_documents(little)]
    return "".join(parts)


def markdown(summaries: Sequence[Summary]) -> str:
    """The table's rows for a document; the whole model's share beside the decoder's."""
    head = (
        "| kept of decoder (of whole) | widths | tokens | method | seeds | dense | slim "
        "| recovery | its 95 % interval | over seeds | tasks | ATP leads by | its 95 % interval |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    rows = [
        f"| {s.share:.0%} ({s.whole_share:.1%}) | {s.widths} | {s.tokens:,} | {s.method} "
        f"| {s.seeds} | {s.dense_perplexity:.2f} | {s.perplexity:.2f} "
        f"| {s.recovery.value:.3f} | {s.recovery.interval_text} | {_spread(s)} "
        f"| {s.task_recovery:.3f} | {' | '.join(lead_cells(s))} |\n"
        for s in summaries
    ]
    return head + "".join(rows)


def by_documents(results: Iterable[Result]) -> str:
    """A row a size of the train split and method; decision and test are those of all documents."""
    rows = [
        f"| {r.cell.documents:,} | {r.tokens:,} | {r.cell.domain} | {r.cell.method} "
        f"| {r.dense_perplexity:.2f} | {r.perplexity:.2f} | {r.recovery:.3f} "
        f"| {recovery_of(r).interval_text} |\n"
        for r in sorted(results, key=lambda r: (r.cell.domain, r.cell.documents, -r.recovery))
    ]
    head = (
        "| documents | tokens read | text | method | dense | slim | recovery | its interval |\n"
        "|---:|---:|---|---|---:|---:|---:|---:|\n"
    )
    return "".join([head, *rows])


def _mermaid(curve: _Curve) -> str:
    tokens = ", ".join(f'"{s.tokens / 1e6:.2g} M"' for s in curve.points)
    values = ", ".join(f"{s.recovery.value:.3f}" for s in curve.points)
    colour = f'{{"themeVariables": {{"xyChart": {{"plotColorPalette": "{FIRST}"}}}}}}'
    return (
        f"```mermaid\n%%{{init: {colour}}}%%\n"
        f'xychart-beta\n  title "{curve.name}: recovery by tokens of training"\n'
        f"  x-axis [{tokens}]\n  y-axis 0.5 --> 1\n  line [{values}]\n```\n\n"
    )


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """ATP by tokens of training: means over the seeds that ran at every length."""

    seeds: tuple[int, ...]
    points: tuple[Summary, ...]

    @property
    def domain(self) -> str:
        return self.points[0].domain

    @property
    def name(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        plural = "s" if len(self.seeds) > 1 else ""
        return f"{self.domain}, {1 - self.points[0].share:.0%} cut, seed{plural} {seeds}"


def _curves(results: Sequence[Result]) -> list[_Curve]:
    """Of every domain and budget that ran at more than one length."""
    budgets: dict[tuple[str, float], list[Result]] = {}
    for r in results:
        if r.cell.method == "atp" and r.cell.widths == "per-layer" and not r.cell.documents:
            budgets.setdefault((r.cell.domain, r.cell.share), []).append(r)
    curves = []
    for rows in budgets.values():
        lengths = {r.tokens for r in rows}
        seeds = set.intersection(*({r.cell.seed for r in rows if r.tokens == n} for n in lengths))
        points = summarize(r for r in rows if r.cell.seed in seeds)
        if len(points) > 1:
            curves.append(_Curve(seeds=tuple(sorted(seeds)), points=tuple(points)))
    return curves


def _spread(s: Summary) -> str:
    return "" if s.seeds == 1 else "{:.3f} to {:.3f}".format(*s.recovery_spread)


def page(results: Sequence[Result]) -> str:
    """One self-contained HTML page: recovery by method in every domain, and against tokens."""
    summaries, curves = summarize(results), _curves(results)
    domains = dict.fromkeys(s.domain for s in summaries)
    figures = [_methods([s for s in summaries if s.domain == domain]) for domain in domains]
    if curves:
        figures.append(_tokens(curves))
    parts = [f.to_html(full_html=False, include_plotlyjs=i == 0) for i, f in enumerate(figures)]
    return (
        '<!doctype html><meta charset="utf-8"><title>atp-edge bench quality</title>'
        '<body style="max-width:60rem;margin:2rem auto;font-family:system-ui,sans-serif">'
        "<h1>Recovery at equal tokens</h1>"
        "<p>Dense over slim perplexity; whiskers are 95 % intervals over the test blocks.</p>"
        f"{''.join(parts)}</body>"
    )


def _methods(summaries: Sequence[Summary]) -> go.Figure:
    """A bar a method, for one domain."""
    figure = go.Figure()
    figure.add_bar(
        y=[f"{s.method} · {1 - s.share:.0%} cut · {s.widths} · {s.tokens:,}" for s in summaries],
        x=[s.recovery.value for s in summaries],
        error_x=_whiskers(summaries),
        orientation="h",
        marker_color=[FIRST if s.method == "atp" else REST for s in summaries],
    )
    figure.update_layout(
        title=f"{summaries[0].domain}: method · decoder cut · widths · tokens",
        height=160 + 26 * len(summaries),
        margin={"l": 320},
    )
    figure.update_xaxes(rangemode="tozero", title="recovery")
    figure.update_yaxes(autorange="reversed")
    return figure


def _tokens(curves: Sequence[_Curve]) -> go.Figure:
    figure = go.Figure()
    for curve in curves:
        figure.add_scatter(
            x=[s.tokens for s in curve.points],
            y=[s.recovery.value for s in curve.points],
            error_y=_whiskers(curve.points),
            mode="lines+markers",
            name=curve.name,
        )
    figure.update_layout(title="Recovery by tokens of training", showlegend=True)
    figure.update_xaxes(type="log", dtick=1, title="tokens")
    figure.update_yaxes(rangemode="tozero", title="recovery")
    return figure


def _whiskers(summaries: Sequence[Summary]) -> dict[str, Any]:
    """The intervals as plotly takes them: how far each end is from its value."""
    ends = [(s.recovery.value, s.recovery.ends) for s in summaries]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in ends],
        "arrayminus": [value - low for value, (low, _) in ends],
    }
