"""The figures of a run as rows: one function makes them; terminal, README and report show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from atp_edge.pipeline.shipped_quality import shipped_perplexity


@dataclass(frozen=True)
class Row:
    """One figure: dense tuned, slim, and what the slim model gains (or keeps).

    untouched: of the model as it came, where it differs from the dense tuned one's.
    """

    name: str
    dense: str
    slim: str
    change: str
    untouched: str = ""


def millions(value: float) -> str:
    return f"{value / 1e6:.1f} M"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms"


def _perplexity(value: float) -> str:
    return f"{value:.2f}"


def rows_of(metrics: dict[str, Any]) -> list[Row]:
    """Every figure the run has so far; a stage that has not run adds none."""
    rows = []

    def add(
        name: str, dense: float, slim: float, show: Callable[[float], str], change: str
    ) -> None:
        rows.append(Row(name, show(dense), show(slim), change))

    if "shrink" in metrics:
        dense, slim = metrics["shrink"]["dense"], metrics["shrink"]["slim"]
        for name, key, show in (
            ("decoder parameters", "decoder_parameters", millions),
            ("all parameters", "parameters", millions),
            ("checkpoint", "bytes", megabytes),
        ):
            add(name, dense[key], slim[key], show, f"{slim[key] / dense[key]:.1%} kept")
    if "train" in metrics:
        before = metrics["train"]["dense_tuned_perplexity"]
        after = metrics.get("shrink", metrics["train"])["perplexity"]
        rows.append(
            Row(
                "perplexity",
                _perplexity(before),
                _perplexity(after),
                f"{before / after:.1%} recovered",
                untouched=_perplexity(metrics["train"]["untuned_perplexity"]),
            )
        )
        if "quality" in metrics.get("verify", {}):
            shipped = shipped_perplexity(metrics)
            kept = f"{before / shipped:.1%} recovered"
            rows.append(Row("perplexity, as shipped", "", _perplexity(shipped), kept))
    if "bench" in metrics:
        dense, slim = metrics["bench"]["rows"]["dense"], metrics["bench"]["rows"]["slim"]
        of = of_batch(metrics)
        for name, key, show in (
            ("ONNX file", "file_bytes", megabytes),
            (f"first token{of}", "first_token_ms", milliseconds),
            (f"per token, p50{of}", "token_ms_p50", milliseconds),
            (f"per token, p95{of}", "token_ms_p95", milliseconds),
            ("load", "load_ms", milliseconds),
            (f"peak memory{of}", "peak_memory_bytes", megabytes),
        ):
            gain = f"{dense[key] / slim[key]:.2f}x"
            add(name, dense[key], slim[key], show, gain)
    return rows


def of_batch(metrics: dict[str, Any]) -> str:
    """What is said behind a figure of the bench that measured rows together."""
    batch = metrics["bench"]["settings"]["batch"]
    return f", batch {batch}" if batch > 1 else ""


def table(metrics: dict[str, Any]) -> Table:
    """The rows for a terminal of 80 columns."""
    shown = Table(title="untouched, dense fine-tuned and slim", title_justify="left")
    shown.add_column("", no_wrap=True)
    for name in ("untouched", "dense tuned", "slim", "slim : dense"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows_of(metrics):
        shown.add_row(row.name, row.untouched, row.dense, row.slim, row.change)
    return shown


def rounding_table(figures: dict[str, Any]) -> Table:
    """`atp-edge bench rounding` for a terminal of 80 columns: a row an export, fp32 first."""
    shown = Table(
        title=f"perplexity of {figures['blocks']} test blocks, the slim model as exported",
        title_justify="left",
    )
    for name, justify in (("", "left"), ("quantizer", "left"), ("ONNX file", "right"),
                          ("perplexity", "right"), ("over fp32", "right")):  # fmt: skip
        shown.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    shown.add_row("fp32 (PyTorch)", "", "", _perplexity(figures["fp32_perplexity"]), "")
    for row in figures["rows"]:
        shown.add_row(
            row["precision"],
            row["quantizer"],
            megabytes(row["onnx_bytes"]),
            _perplexity(row["onnx_perplexity"]),
            f"{row['ratio']:.4f}x",
        )
    return shown


def export_lines(figures: dict[str, Any]) -> list[str]:
    """What `atp-edge export --to` found of a folder, a line a figure."""
    lines = [f"  {figures['proven']}"] if "proven" in figures else []
    if quality := figures.get("quality"):
        measured = quality.get("onnx_perplexity", quality.get("perplexity"))
        lines.append(
            f"  perplexity {measured:.2f}, slim in fp32 "
            f"{quality['fp32_perplexity']:.2f} ({quality['ratio']:.4f}x)"
        )
    if "bytes" in figures:
        lines.append(f"  model file {megabytes(figures['bytes'])}")
    # Another layout was measured before it was made of the plain one.
    by = " in ONNX Runtime" if "layout" in figures else ""
    for name, row in figures.get("bench", {}).get("rows", {}).items():
        lines.append(
            f"  {name}{by}: first token {milliseconds(row['first_token_ms'])}, per token "
            f"{milliseconds(row['token_ms_p50'])}, peak {megabytes(row['peak_memory_bytes'])}, "
            f"file {megabytes(row['file_bytes'])}"
        )
    return lines
