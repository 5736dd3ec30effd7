"""Every fault of an export is caught, and what changes nothing passes."""

from __future__ import annotations

import pytest

from tests.atp_export.verification.mutations.bench import Outcome, outcomes
from tests.atp_export.verification.mutations.tables import COMBINATIONS, cell, said


def tried(model: str, flavour: str, precision: str, *, every: bool) -> list[Outcome]:
    found = list(outcomes(model, flavour, precision, every=every))
    unharmed, *faults = found
    assert unharmed.kind == "unharmed"
    assert not unharmed.caught_by, unharmed
    assert not [fault for fault in faults if fault.missed]
    assert not [fault for fault in faults if fault.false_alarm]
    return faults


@pytest.mark.parametrize(
    ("flavour", "precision", "by"),
    [("ort", "int4", {"rounding", "faint"}), ("portable", "fp16", {"weights", "shipped"})],
)
def test_the_first_fault_of_each_kind(flavour: str, precision: str, by: set[str]) -> None:
    """by: what catches a fault here and not everywhere; an epsilon is no attribute in `portable`,
    and its first scalar is none."""
    faults = tried("windowed", flavour, precision, every=False)
    assert len(faults) > 100
    found = {said(fault) for fault in faults}
    assert found >= {"harmless", "graph", "places", "token ids", "runs"} | by


@pytest.mark.large
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("model", "flavour", "precision"), COMBINATIONS)
def test_every_fault(model: str, flavour: str, precision: str) -> None:
    assert len(tried(model, flavour, precision, every=True)) > 200


def outcome(change: float, *caught_by: str, shipped_change: float = 0.0) -> Outcome:
    return Outcome(
        of="Mul",
        where="Mul gate",
        kind="bypassed",
        change=change,
        shipped_change=shipped_change,
        caught_by=caught_by,
    )


def test_a_fault_is_harmless_by_what_it_changes_alone() -> None:
    assert said(outcome(1e-7)) == "harmless"
    assert said(outcome(2e-6)) == "MISSED"
    assert said(outcome(float("nan"))) == "MISSED"
    assert said(outcome(2e-6, "the graph in fp32, at once")) != "MISSED"
    assert said(outcome(1e-7, "the graph in fp32")) == "FALSE ALARM"
    # What the file's own tensors show, or the shipped runtime alone, is no false alarm.
    assert said(outcome(1e-7, "weights")) == "weights"
    assert said(outcome(1e-7, "as shipped", shipped_change=0.1)) == "shipped"


def test_a_cell_counts_where_outcomes_differ() -> None:
    assert cell([outcome(0.1, "as shipped"), outcome(0.2, "as shipped")]) == "shipped"
    assert cell([outcome(0.1, "weights"), outcome(3e-8), outcome(0.0)]) == (
        "harmless 2 (3e-08), weights 1"
    )
