"""Items on which dense and slim differ in being right: what equal accuracy hides (2407.09141)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atp_edge.gate.answered import Answered
from atp_edge.gate.results import Flip

SHOWN = 12
_LONGEST = 240
_TURNED = 0.5  # of ROUGE-L, that calls a text turned


def flips_of(items: Sequence[Answered]) -> tuple[tuple[Flip, ...], dict[str, Any]]:
    """Examples side by side, right to wrong first; and how many there are of how many."""
    worse = [x for x in items if _turned(x) > 0]
    better = [x for x in items if _turned(x) < 0]
    choices = [x for x in items if not x.generated]
    turned = sum(1 for x in choices if _turned(x))
    figures = {
        "items": len(items),
        "right_to_wrong": len(worse),
        "wrong_to_right": len(better),
        "share_of_choices": turned / len(choices) if choices else None,
    }
    shown = [*worse[: SHOWN - SHOWN // 3], *better[: SHOWN // 3]]
    return tuple(_flip(item) for item in shown), figures


def _turned(item: Answered) -> int:
    """1: the slim model lost what the dense one had right; -1: won it."""
    change = item.score[0] - item.score[1]
    least = _TURNED if item.generated else 1.0
    return int(change >= least) - int(change <= -least)


def _flip(item: Answered) -> Flip:
    return Flip(
        task=item.task,
        slice=item.slice,
        kind="right to wrong" if _turned(item) > 0 else "wrong to right",
        prompt=_short(item.prompt, end=True),
        expected=_short(item.expected),
        dense=_short(item.said[0]),
        slim=_short(item.said[1]),
    )


def _short(text: str, *, end: bool = False) -> str:
    plain = " ".join(text.split())
    if len(plain) <= _LONGEST:
        return plain
    return f"…{plain[-_LONGEST:]}" if end else f"{plain[:_LONGEST]}…"
