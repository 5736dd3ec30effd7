"""Sentences of a command, broken at words to a terminal's width. A path stays whole, and so does a
line that goes into a file or a pipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text


def wrapped(line: str, width: int) -> list[str]:
    """A line's lines; those after the first are set in as it is. No word is broken."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def say_lines(console: Console, lines: Iterable[str], style: str = "") -> None:
    """Print lines, each broken at words where a person reads them."""
    for line in lines:
        for part in wrapped(line, console.width) if console.is_terminal else [line]:
            console.print(Text(part, style=style), soft_wrap=True)
