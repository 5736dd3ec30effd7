"""Lines of a command, broken at words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from atp_edge.cli.wrapped import say_lines, wrapped
from atp_edge.pipeline.summary import export_lines

FIGURES = {
    "proven": "not proven here: llama.cpp is not at hand. Its tensors are the checkpoint's. To "
    "have llama.cpp run it: npm install --ignore-scripts node-llama-cpp "
    "@node-llama-cpp/linux-x64, and ATP_NODE_FOLDER names the folder of its node_modules",
    "quality": {"perplexity": 20.0, "fp32_perplexity": 19.8, "ratio": 1.0101},
    "bytes": 97_000_000,
}
"""Of a GGUF export, as `pipeline.export_gguf` has them."""


def said(terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    say_lines(console, export_lines(FIGURES))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_what_an_export_found_fits_a_terminal_of_80_columns() -> None:
    lines, piped = (said(terminal).splitlines() for terminal in (True, False))
    assert max(map(len, lines)) <= 80
    assert piped == export_lines(FIGURES), "whole, for whoever looks for a line"
    assert all(line.startswith("  ") for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(export_lines(FIGURES)).split())


@pytest.mark.parametrize("word", ["/a/path/" + "x" * 90, "@node-llama-cpp/linux-x64"])
def test_a_path_or_a_name_stays_whole(word: str) -> None:
    lines = wrapped(f"  what was written is {word} alone", 30)
    assert any(word in line for line in lines)
