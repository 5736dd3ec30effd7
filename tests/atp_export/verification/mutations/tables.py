"""The tables of docs/verify.md, written anew (most of an hour on two cores):

python -m tests.atp_export.verification.mutations.tables
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tests.atp_export.verification.mutations.bench import (
    FLAVOURS,
    HARMLESS,
    PRECISIONS,
    ROOT,
    Outcome,
    outcomes,
)

PAGE = ROOT / "docs" / "verify.md"
BEGIN, END = "<!-- mutations: written by the command above -->", "<!-- mutations: end -->"
SHORT = {
    "crash": "crash",
    "runs": "runs",
    "finite": "finite",
    "weights": "weights",
    "rounding": "rounding",
    "rotary": "rotary",
    "places": "places",
    "the graph in fp32": "graph",
    "with a faint residual stream": "faint",
    "as shipped": "shipped",
    "greedy": "greedy",
}
"""Names of checks as the tables have them; of several that catch a fault, the first is named."""

COMBINATIONS = [
    *(("windowed", flavour, precision) for flavour in FLAVOURS for precision in PRECISIONS),
    *(("biased", flavour, precision) for flavour in FLAVOURS for precision in ("fp32", "int4")),
]


def said(outcome: Outcome) -> str:
    """In one word."""
    if outcome.missed:
        return "MISSED"
    if outcome.false_alarm:
        return "FALSE ALARM"
    return next((short for name, short in SHORT.items() if name in outcome.caught_by), "harmless")


def cell(found: Sequence[Outcome]) -> str:
    """What caught faults of one kind, how many where they differ; what harmless ones change."""
    counts = Counter(map(said, found))
    parts = []
    for word, count in counts.most_common():
        part = word if len(counts) == 1 else f"{word} {count}"
        if word == "harmless":
            largest = max(o.change for o in found if said(o) == word)
            part += f" ({largest:.0e})" if largest else " (0)"
        parts.append(part)
    return ", ".join(parts)


def table(by_precision: dict[str, list[Outcome]]) -> Iterator[str]:
    """Lines of one flavour's table: a row for each kind of fault."""
    rows: dict[tuple[str, str], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for precision, found in by_precision.items():
        for outcome in found:
            rows[outcome.of, outcome.kind][precision].append(outcome)
    yield f"| of | fault | {' | '.join(PRECISIONS)} |"
    yield f"|---|---|{'---|' * len(PRECISIONS)}"
    for (of, kind), found in sorted(rows.items()):
        cells = [cell(found[precision]) if found[precision] else "–" for precision in PRECISIONS]
        yield f"| {of} | {kind} | {' | '.join(cells)} |"


def text(found: dict[str, dict[str, list[Outcome]]]) -> str:
    """All tables, with what they come to."""
    every = [o for by_precision in found.values() for of in by_precision.values() for o in of]
    words = Counter(map(said, every))
    caught = sum(bool(o.caught_by) for o in every)
    lines = [
        f"{len(every)} trials: {caught} caught, {words['harmless']} harmless (a change of at most "
        f"{HARMLESS:g}), {words['MISSED']} missed, {words['FALSE ALARM']} false alarms.",
    ]
    for flavour, by_precision in found.items():
        lines += ["", f"### {flavour}", "", *table(by_precision)]
    return "\n".join(lines)


def write() -> None:
    """Try all, and write the page."""
    found: dict[str, dict[str, list[Outcome]]] = {f: defaultdict(list) for f in FLAVOURS}
    for model, flavour, precision in COMBINATIONS:
        found[flavour][precision] += outcomes(model, flavour, precision, every=True)
    page = PAGE.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    written = f"{BEGIN}\n\n{text(found)}\n\n{END}"
    PAGE.write_text(between.sub(lambda _: written, page), encoding="utf-8")


if __name__ == "__main__":
    write()
