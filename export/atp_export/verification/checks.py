"""What a proof is made of: one measured value against its bound a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was measured.

    says: what was found, as a sentence's clause, with the place where it is worst.
    """

    name: str
    value: float
    bound: float
    passed: bool
    says: str


def at_most(name: str, value: float, bound: float, says: str) -> Check:
    """A value that must not pass its bound; one that is not a number does."""
    return Check(name=name, value=value, bound=bound, passed=value <= bound, says=says)


def none_of(name: str, faults: list[str], says: str) -> Check:
    """Faults of which there must be none; the first one is named."""
    if not faults:
        return at_most(name, 0, 0, f"no {says}")
    more = f" and {len(faults) - 1} more" if faults[1:] else ""
    return at_most(name, len(faults), 0, f"{says}: {faults[0]}{more}")
