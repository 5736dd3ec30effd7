"""Every fault of an export is caught, and what changes nothing passes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.atp_export.verification.mutations.bench import Outcome, outcomes
from tests.atp_export.verification.mutations.tables import COMBINATIONS, cell, said


def tried(model: str, flavour: str, precision: str, **which: Any) -> list[Outcome]:
    found = list(outcomes(model, flavour, precision, **which))
    unharmed, *faults = found
    assert unharmed.kind == "unharmed"
    assert not unharmed.caught_by, unharmed
    assert not [fault for fault in faults if fault.missed]
    assert not [fault for fault in faults if fault.false_alarm]
    return faults


CAUGHT_ANYWHERE = {"harmless", "graph", "places", "token ids", "runs"}


@pytest.fixture(scope="module")
def of_ort() -> list[Outcome]:
    return tried("windowed", "ort", "int4", every=False)


def test_the_first_fault_of_each_kind(of_ort: list[Outcome]) -> None:
    assert len(of_ort) > 100
    assert {said(fault) for fault in of_ort} >= CAUGHT_ANYWHERE | {"rounding", "faint"}


def test_the_first_fault_of_each_kind_that_another_flavour_and_precision_have(
    of_ort: list[Outcome],
) -> None:
    """Faults of operators are of those that a flavour has; of the model and of tensors, what was
    tried there is not tried again. An epsilon is no attribute here, and the first scalar is none.
    """
    again = {(fault.of, fault.kind) for fault in of_ort if not fault.of[0].isupper()}
    faults = tried("windowed", "portable", "fp16", every=False, without=again)
    assert len(faults) > 80
    assert {said(fault) for fault in faults} >= CAUGHT_ANYWHERE | {"weights", "shipped"}


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
