"""Conditions that a user asks a run to meet (`--require`), over the figures of its metrics.json.

A condition is a flag (`proven`, `gate`) or a comparison of a figure with a number or with another
figure: `recovery>=0.9`, `perplexity<untouched`. It is parsed before any work and judged after all.
What is compared are the figures as the table shows them, not the ends of their intervals.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp_edge.pipeline.shipped_quality import shipped_perplexity
from atp_edge.run.errors import ConditionNotMetError

Metrics = Mapping[str, Any]
_MOST_PLACES = 16
# The longer ones first: `<=` begins with `<`.
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


FIGURES: dict[str, Callable[[Metrics], float]] = {
    "perplexity": shipped_perplexity,
    "untouched": lambda m: m["train"]["untuned_perplexity"],
    "tuned": lambda m: m["train"]["dense_tuned_perplexity"],
    "recovery": lambda m: m["train"]["dense_tuned_perplexity"] / shipped_perplexity(m),
    "first-token": lambda m: m["bench"]["ratios"]["first_token_ms"],
    "per-token": lambda m: m["bench"]["ratios"]["token_ms_p50"],
    "memory": lambda m: m["bench"]["ratios"]["peak_memory_bytes"],
    "size": lambda m: m["bench"]["ratios"]["file_bytes"],
}
"""Perplexities of what ships, the untouched and the tuned dense model; tuned over what ships;
and, from the bench, how many times better than the dense model. They raise KeyError where not
measured."""


def _proven(proofs: Mapping[str, Any]) -> bool:
    """On every execution provider, and on one at least."""
    return bool(proofs) and all(proof["passed"] for proof in proofs.values())


FLAGS: dict[str, Callable[[Metrics], bool]] = {
    "proven": lambda m: _proven(m["verify"]["providers"]),
    "gate": lambda m: m["gate"]["verdict"] == "passed",
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """left, and what it is compared with; a flag has no comparison."""

    text: str
    left: str
    comparison: str = ""
    right: str | float = ""

    def unmet(self, metrics: Metrics) -> str | None:
        """Why the figures do not meet it, or None."""
        try:
            if not self.comparison:
                return None if FLAGS[self.left](metrics) else "it is not so"
            left = FIGURES[self.left](metrics)
            number = isinstance(self.right, float)
            right = float(self.right) if number else FIGURES[str(self.right)](metrics)
        except KeyError:
            return "it was not measured"
        if COMPARISONS[self.comparison](left, right):
            return None
        shown, bound = _shown(left, right)
        return f"{self.left} is {shown}" + ("" if number else f", {self.right} {bound}")


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """The conditions of `--require`, in their order. Raises ValueError for one that is none."""
    return tuple(_parsed(text) for text in texts)


def check_conditions(
    conditions: Sequence[Condition], metrics: Metrics, stale: Collection[str] = ()
) -> None:
    """Raise ConditionNotMetError naming every condition that the figures do not meet. stale: stages
    whose figures are of other files than there are now; with any, none is met."""
    changed = f"files changed after {', '.join(stale)} measured them" if stale else None
    found = {c.text: changed or c.unmet(metrics) for c in conditions}
    unmet = [f"{text}: {why}" for text, why in found.items() if why]
    if unmet:
        raise ConditionNotMetError(f"required and not met: {'; '.join(unmet)}")


def _parsed(text: str) -> Condition:
    parts = re.split("(<=|>=|<|>)", "".join(text.split()))
    if len(parts) == 1:
        return Condition(text=text, left=_known(text, parts[0], FLAGS))
    if len(parts) != 3:
        raise ValueError(
            f"--require {text!r}: expected one comparison (<, <=, >, >=), as in recovery>=0.9"
        )
    left, comparison, right = parts
    left = _known(text, left, FIGURES)
    number = _number(right)
    value = _known(text, right, FIGURES) if number is None else number
    return Condition(text=text, left=left, comparison=comparison, right=value)


def _known(text: str, name: str, names: Mapping[str, object]) -> str:
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    if name in FIGURES:
        raise ValueError(f"--require {text!r}: compare {name}, as in {name}>=1")
    if name in FLAGS:
        raise ValueError(f"--require {text!r}: {name} stands alone; it is so, or not")
    raise ValueError(
        f"--require {text!r}: unknown name {name!r}{hint} Expected one of {', '.join(FLAGS)}, or a "
        f"comparison of {', '.join(FIGURES)} with each other or a number"
    )


def _number(text: str) -> float | None:
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if share else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _shown(*values: float) -> tuple[str, ...]:
    """Numbers as people read them: no powers of ten, three digits that count at least, and as many
    as tell them apart."""
    least = min((abs(v) for v in values if v and math.isfinite(v)), default=1.0)
    for places in range(max(2, 2 - math.floor(math.log10(least))), _MOST_PLACES):
        shown = tuple(f"{value:,.{places}f}" for value in values)
        if len(set(shown)) == len(set(values)):
            return shown
    return tuple(map(repr, values))
