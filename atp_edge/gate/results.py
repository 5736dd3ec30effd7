"""What a check found, and the verdict on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from atp_edge.gate.statistics import Judged, Status

SCHEMA = 1
Verdict = Literal["passed", "failed", "undecided"]


def key_of(name: str, slice: str) -> str:
    """What a check is called, in one line of what can be seen."""
    return seen(f"{name} [{slice}]" if slice else name)


def seen(text: str) -> str:
    """A text with what has no sign of its own, line ends and a terminal's commands, written out: it
    may be of a user's file."""
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check. Numbers that it has not are None.

    required: undecided, it leaves the verdict undecided; else it is named beside it. slice: the
    part of the data, empty for all of it. difference: positive is worse.
    """

    name: str
    status: Status
    text: str
    slice: str = ""
    required: bool = True
    dense: float | None = None
    slim: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    limit: float | None = None
    p_value: float | None = None
    detectable: float | None = None
    items: int = 0
    clusters: int = 0

    @property
    def key(self) -> str:
        return key_of(self.name, self.slice)


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An item on which dense and slim differ in being right, side by side."""

    task: str
    slice: str
    kind: Literal["right to wrong", "wrong to right"]
    prompt: str
    expected: str
    dense: str
    slim: str


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All that the gate found, as gate.json has it."""

    profile: str
    form: str
    level: float
    checks: tuple[Check, ...]
    figures: dict[str, Any]
    flips: tuple[Flip, ...]
    files: dict[str, str]
    settings: dict[str, Any]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    undecided_fails: bool = field(default=False)
    changed: tuple[str, ...] = ()
    """Settings that are not the profile's."""

    @property
    def verdict(self) -> Verdict:
        """failed: any check; undecided: any required one (or any at all, in a strict profile)."""
        if any(check.status == "failed" for check in self.checks):
            return "failed"
        open_ones = [check for check in self.checks if check.status == "undecided"]
        if not self.checks or any(c.required or self.undecided_fails for c in open_ones):
            return "undecided"
        return "passed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What failed, then what is undecided."""
        failed = [f"failed: {seen(c.text)}" for c in self.checks if c.status == "failed"]
        open_ones = [c for c in self.checks if c.status == "undecided"]
        undecided = [f"undecided: {seen(c.text)}" for c in open_ones if c.required or not c.slice]
        slices = [c for c in open_ones if c.slice and not c.required]
        if slices:
            names = ", ".join(c.key for c in slices[:4])
            more = f" and {len(slices) - 4} more" if len(slices) > 4 else ""
            undecided.append(f"undecided, too little data: {names}{more}")
        return (*failed, *undecided)

    def to_dict(self) -> dict[str, Any]:
        """gate.json: finite numbers, null where there is none."""
        content = asdict(self) | {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
        }
        del content["undecided_fails"]
        finite: dict[str, Any] = _finite(content)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def judged_by(profile: str, changed: Sequence[str]) -> str:
    """The profile, and how many of its settings are others, as a clause."""
    plural = "s" if len(changed) > 1 else ""
    more = f" with {len(changed)} setting{plural} changed" if changed else ""
    return f"profile {profile}{more}"


def of_judged(
    name: str,
    one: Judged,
    *,
    what: str,
    unit: str,
    slice: str = "",
    required: bool = True,
    dense: float | None = None,
    slim: float | None = None,
    clusters: str = "documents",
) -> Check:
    """A check of a tested difference. what: the measured thing, as a clause's subject; clusters:
    what errors are clustered by. One that is by itself beyond its margin is required: a verdict
    does not pass over it."""
    return Check(
        name=name,
        status=one.status,
        text=_sentence(one, what, unit, clusters),
        slice=slice,
        required=required or one.suspected,
        dense=dense,
        slim=slim,
        difference=one.difference.mean,
        interval=one.interval,
        limit=one.margin,
        p_value=one.p_worse,
        detectable=one.detectable,
        items=one.difference.items,
        clusters=one.difference.clusters,
    )


def _sentence(one: Judged, what: str, unit: str, clusters: str) -> str:
    low, high = one.interval
    count = one.difference.clusters
    of = f"{count} {clusters.removesuffix('s') if count == 1 else clusters}"
    if one.difference.clusters and not one.difference.told:
        return f"{what}: no number, on one at least of {of}"
    if one.difference.clusters < 2 or not math.isfinite(high):
        return f"{what}: {of}, too few to tell anything"
    figures = f"{one.difference.mean:+.3f} {unit} ({low:+.3f} to {high:+.3f}, {of})"
    match one.status:
        case "failed":
            return f"{what}: {figures}, beyond the margin of {one.margin:g}"
        case "passed":
            return f"{what}: {figures}, within the margin of {one.margin:g}"
        case _ if one.suspected:
            among = f" among {one.family}" if one.family > 1 else ""
            return (
                f"{what}: {figures}, by itself beyond the margin of {one.margin:g}, but so few "
                f"do not tell it{among}: more {clusters} would"
            )
        case _:
            needed = one.clusters_needed
            enough = needed <= one.difference.clusters
            more = "" if enough else f"; about {needed} {clusters} would tell"
            least = f"the least that would have been seen is {one.detectable:.3f}"
            if not math.isfinite(one.detectable):
                least = "of so few no loss would have been seen, however large"
            return f"{what}: {figures}, not told from the margin of {one.margin:g}: {least}{more}"
