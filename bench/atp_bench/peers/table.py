"""A comparison as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_COLUMNS = ("tok/s", "first ms", "512 ms", "peak MB", "file MB")


def comparison_table(precision: str, found: Mapping[str, Any]) -> Table:
    """Rows by model; below them each pair's decode ratio with its spread and its share of the
    bound that the bytes moved set."""
    settings = found["settings"]
    shown = Table(
        title=f"{precision}, {settings['prompt_tokens']} + {settings['new_tokens']} tokens, "
        f"batch {settings['batch']}, "
        f"{settings['threads']} threads, medians of {settings['rounds']} rounds in turn",
        title_justify="left",
    )
    shown.add_column("")
    for name in _COLUMNS:
        shown.add_column(name, justify="right", no_wrap=True)
    longer = found["first_token"]["ms"]
    for name, row in found["rows"].items():
        shown.add_row(
            name,
            f"{row['tokens_per_s']:.1f}",
            f"{row['first_token_ms']:.0f}",
            f"{longer[name]:.0f}" if name in longer else "",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            f"{row['file_bytes'] / 1e6:.0f}",
        )
    for pair, ratios in found["pairs"].items():
        reference, ours = pair.split(" : ")
        low, high = ratios["token_ms_p50_spread"]
        bound = found["bounds"].get(pair)
        of_bound = f", {bound['share']:.0%} of the {bound['bound']:.2f}x bound" if bound else ""
        at_512 = found["first_token"]["pairs"].get(pair)
        shown.caption = "\n".join(
            [
                *([str(shown.caption)] if shown.caption else []),
                f"{ours} against {reference}: decode {ratios['token_ms_p50']:.2f}x "
                f"({low:.2f} to {high:.2f}){of_bound}, peak memory "
                f"{ratios['peak_memory_bytes']:.2f}x"
                + (f", first token at 512 {_with_quartiles(at_512)}" if at_512 else ""),
            ]
        )
    shown.caption_justify = "left"
    return shown


def _with_quartiles(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f}x (quartiles {low:.2f} to {high:.2f})"


def targets_table(precisions: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every target beside what was measured, precision by precision."""
    shown = Table(title="asked and measured", title_justify="left")
    shown.add_column("", overflow="fold")
    for name in ("asked", "measured", ""):
        shown.add_column(name, justify="right", no_wrap=True)
    for found in precisions.values():
        for line in found["asked"]:
            note = f" ({line['note']})" if line["note"] else ""
            shown.add_row(
                f"{line['precision']}: {line['what']}{note}",
                f"{line['asked']:.2f}x",
                f"{line['measured']:.2f}x",
                "met" if line["met"] else "missed",
            )
    return shown
