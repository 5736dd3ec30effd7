"""The tables of docs/verify.md, written anew (two hours of one core; a stopped call goes on):

python -m tests.atp_export.verification.mutations.tables [--first]

--first: of several faults of one kind (of one operator or class of tensors), the first one alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from atp_edge.run.files import write_atomically
from atp_edge.run.hashes import combined_sha256, files_sha256
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
    "refused": "refused",
    "crash": "crash",
    "runs": "runs",
    "finite": "finite",
    "weights": "weights",
    "rounding": "rounding",
    "rotary": "rotary",
    "places": "places",
    "token ids": "token ids",
    "the graph in fp32": "graph",
    "with a faint residual stream": "faint",
    "as shipped": "shipped",
    "greedy": "greedy",
}
"""Names of checks as the tables have them; of several that catch a fault, the first is named."""

BENCH = "tests/atp_export/verification/mutations"
SOURCES = ["export", *(f"{BENCH}/{name}.py" for name in ("bench", "of_graphs", "of_models"))]
"""What outcomes follow from."""

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


def text(found: dict[str, dict[str, list[Outcome]]], *, every: bool) -> str:
    """All tables, with what they come to."""
    which = "every fault" if every else "the first fault of each kind"
    trials = [o for by_precision in found.values() for of in by_precision.values() for o in of]
    words = Counter(map(said, trials))
    caught = sum(bool(o.caught_by) for o in trials)
    lines = [
        f"{len(trials)} trials, {which}: {caught} caught, {words['harmless']} harmless (a change "
        f"of at most {HARMLESS:g}), {words['MISSED']} missed, {words['FALSE ALARM']} false alarms.",
    ]
    for flavour, by_precision in found.items():
        lines += ["", f"### {flavour}", "", *table(by_precision)]
    return "\n".join(lines)


def kept(model: str, flavour: str, precision: str, *, every: bool) -> list[Outcome]:
    """Outcomes of one combination, those of an earlier call where no line of what is tried has
    changed since."""
    sources = files_sha256(ROOT, SOURCES)
    folder = ROOT / "build" / "mutations" / combined_sha256(sources)[:12]
    path = folder / f"{model} {flavour} {precision}{'' if every else ' first'}.json"
    if not path.exists():
        found = [asdict(one) for one in outcomes(model, flavour, precision, every=every)]
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found))
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Outcome(**row | {"caught_by": tuple(row["caught_by"])}) for row in rows]


def write(*, every: bool) -> None:
    """Try all, and write the page."""
    found: dict[str, dict[str, list[Outcome]]] = {f: defaultdict(list) for f in FLAVOURS}
    for model, flavour, precision in COMBINATIONS:
        found[flavour][precision] += kept(model, flavour, precision, every=every)
    page = PAGE.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    written = f"{BEGIN}\n\n{text(found, every=every)}\n\n{END}"
    PAGE.write_text(between.sub(lambda _: written, page), encoding="utf-8")


if __name__ == "__main__":
    write(every="--first" not in sys.argv)
