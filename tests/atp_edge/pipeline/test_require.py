"""Conditions of `--require`: refused early, judged on the figures, named when not met."""

from __future__ import annotations

import re

import pytest

from atp_edge.pipeline.require import check_conditions, parse_conditions
from atp_edge.run.errors import ConditionNotMetError
from tests.atp_edge.pipeline.test_report import metrics

# Of `metrics`: slim 20.8, untouched 18.4, tuned 13.0, so recovery 0.625; 1.515 times faster.


@pytest.mark.parametrize(
    "met",
    ["perplexity<21", "perplexity <= 20.8", "untouched<perplexity", "recovery>=0.625",
     "recovery>=62%", "per-token>1.5", "size > 1.5", "tuned<untouched", "proven"],
)  # fmt: skip
def test_a_condition_that_is_met_says_nothing(met: str) -> None:
    check_conditions(parse_conditions([met]), metrics())


def test_all_that_is_not_met_is_named_with_its_figures() -> None:
    asked = parse_conditions(["perplexity<untouched", "recovery>=0.9", "memory>1", "gate"])
    with pytest.raises(ConditionNotMetError) as error:
        check_conditions(asked, metrics())
    assert str(error.value) == (
        "required and not met: perplexity<untouched: perplexity is 20.80, untouched 18.40; "
        "recovery>=0.9: recovery is 0.625; gate: it is not so"
    )


def test_a_figure_equal_to_its_bound_is_not_less() -> None:
    with pytest.raises(ConditionNotMetError, match=r"perplexity is 20\.80$"):
        check_conditions(parse_conditions(["perplexity<20.8"]), metrics())


def test_a_failed_proof_and_a_failed_gate_are_not_met() -> None:
    figures = metrics()
    figures["verify"]["providers"]["CPUExecutionProvider"]["passed"] = False
    with pytest.raises(ConditionNotMetError, match=r"proven: it is not so; gate: it is not so"):
        check_conditions(parse_conditions(["proven", "gate"]), figures)
    figures["verify"]["providers"] = {}
    with pytest.raises(ConditionNotMetError, match="proven: it is not so"):
        check_conditions(parse_conditions(["proven"]), figures)
    check_conditions(parse_conditions(["gate"]), {"gate": {"verdict": "passed"}})


@pytest.mark.parametrize(
    ("slim", "untouched", "said"),
    [
        (25276.51, 25276.5, "perplexity is 25,276.51, untouched 25,276.50"),
        (20.530001, 20.53, "perplexity is 20.530001, untouched 20.530000"),
        (1234567.0, 18.4, "perplexity is 1,234,567.00, untouched 18.40"),
        (1.00004, 0.000123, "perplexity is 1.000040, untouched 0.000123"),
    ],
)
def test_figures_are_shown_as_people_read_them_and_tell_what_is_less(
    slim: float, untouched: float, said: str
) -> None:
    figures = metrics()
    figures["shrink"]["perplexity"] = slim
    figures["train"]["untuned_perplexity"] = untouched
    with pytest.raises(ConditionNotMetError, match=f"{re.escape(said)}$"):
        check_conditions(parse_conditions(["perplexity<untouched"]), figures)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("perplexty<untouched", "unknown name 'perplexty'; did you mean 'perplexity'?"),
        ("recovery", "--require 'recovery': compare recovery, as in recovery>=1"),
        ("proven>=1", "--require 'proven>=1': proven stands alone"),
        ("recovery>=", "unknown name ''"),
        ("recovery>=nan", "unknown name 'nan'. Expected one of proven"),
        ("0.5<recovery<0.9", "expected one comparison"),
        ("recovery=0.9", "unknown name 'recovery=0.9'"),
        ("", "unknown name ''"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_conditions([text])


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(ConditionNotMetError, match="it was not measured; gate: it was not"):
        check_conditions(parse_conditions(["recovery>=0.1", "gate"]), {})


def test_below_fp32_the_perplexity_is_that_of_the_file() -> None:
    figures = metrics()
    figures["verify"]["quality"] = {"ratio": 1.25}
    with pytest.raises(ConditionNotMetError, match="perplexity is 26"):
        check_conditions(parse_conditions(["perplexity<21"]), figures)
