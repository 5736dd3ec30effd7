"""What the gate leaves: verdict and reasons, JSON that its schema describes, JUnit, a table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from atp_edge.gate.outputs import GATE_JSON, JUNIT, schema, table, write_outputs
from atp_edge.gate.results import Check, Flip, GateReport
from atp_edge.gate.settings import changed_of, gate_settings
from atp_edge.pipeline.verdict import verdict_of

PASSED = Check(name="loss", status="passed", text="loss: fine", dense=14.7, slim=15.0, clusters=90)
FAILED = Check(name="kl", status="failed", text="KL <too> large & so on \x00\ud800",
               interval=(0.1, 0.2))  # fmt: skip
OPEN = Check(name="loss", slice="rare", status="undecided", text="loss on 'rare'", required=False,
             detectable=math.inf)  # fmt: skip
NEEDED = replace(OPEN, slice="", name="choice", text="no item", required=True)
FLIP = Flip(task="clause", slice="a", kind="right to wrong", prompt="p", expected="e", dense="e",
            slim="<script>")  # fmt: skip


def report(*checks: Check, **values: Any) -> GateReport:
    fields: dict[str, Any] = {
        "profile": "default", "form": "onnx", "level": 0.05, "figures": {"kl": math.nan},
        "flips": (FLIP,), "files": {"onnx/model.onnx": "ab" * 32}, "settings": {}, "seconds": 1.5,
    }  # fmt: skip
    return GateReport(checks=checks, **(fields | values))


@pytest.mark.parametrize(
    ("checks", "strict", "verdict"),
    [
        ((PASSED, OPEN), False, "passed"),
        ((PASSED, OPEN), True, "undecided"),
        ((PASSED, NEEDED), False, "undecided"),
        ((PASSED, NEEDED, FAILED), False, "failed"),
        ((), False, "undecided"),
    ],
)
def test_passed_is_never_too_little_data(
    checks: tuple[Check, ...], strict: bool, verdict: str
) -> None:
    found = report(*checks, undecided_fails=strict)
    assert found.verdict == verdict
    if OPEN in checks:
        assert "undecided, too little data: loss [rare]" in found.reasons


def test_json_is_as_its_schema_says(tmp_path: Path) -> None:
    write_outputs(report(PASSED, FAILED, OPEN), tmp_path)
    content = json.loads((tmp_path / GATE_JSON).read_text(), parse_constant=lambda x: 1 / 0)
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(content, schema())
    assert content["verdict"] == "failed"
    assert content["figures"]["kl"] is None
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"verdict": "perhaps"}, schema())


def test_junit_fails_what_keeps_it_from_shipping_and_skips_what_does_not(tmp_path: Path) -> None:
    write_outputs(report(PASSED, FAILED, OPEN, NEEDED), tmp_path)
    suite = ElementTree.parse(tmp_path / JUNIT).getroot()
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped", "errors")} == {
        "tests": "4", "failures": "2", "skipped": "1", "errors": "0",
    }  # fmt: skip
    marks = {case.get("name"): [child.tag for child in case] for case in suite}
    assert marks == {
        "loss": [], "kl": ["failure"], "loss [rare]": ["skipped"], "choice": ["failure"],
    }  # fmt: skip
    assert suite.find(".//failure").get("message") == "KL <too> large & so on \ufffd\ufffd"  # type: ignore[union-attr]


def test_the_table_fits_80_columns() -> None:
    shown = io.StringIO()
    long = replace(OPEN, slice="a very long name of a slice indeed", dense=1e4, slim=1e4)
    Console(file=shown, width=80).print(table(report(PASSED, FAILED, long)))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "undecided" in shown.getvalue()
    assert "…" not in shown.getvalue()


def test_the_verdict_of_a_run_says_the_gate_first() -> None:
    found = report(PASSED, FAILED, OPEN)
    section = {
        "verdict": found.verdict, "reasons": list(found.reasons), "profile": "default",
        "counts": {"passed": 1, "failed": 1, "undecided": 1},
    }  # fmt: skip
    said = verdict_of({"gate": section})
    assert said.sentence == "The gate says DO NOT SHIP (1 of 3 checks failed, profile default)."
    assert said.tone == "bad"
    assert said.advice[0].startswith("failed: KL")


def test_the_verdict_says_what_is_not_the_profiles_and_what_does_not_ship() -> None:
    changed = changed_of(gate_settings({"quality.loss": 0.3, "tasks.items": 0, "form": "slim"}))
    assert changed == ("quality.loss = 0.3 (0.105)", "tasks.items = 0 (48)")
    assert changed_of(gate_settings({"profile": "clinical", "data": ["more.jsonl"]})) == ()
    section = {"verdict": "passed", "reasons": [], "profile": "default", "form": "slim",
               "counts": {"passed": 2, "failed": 0, "undecided": 1}}  # fmt: skip
    sentences = [
        verdict_of({"gate": section | {"verdict": verdict, "changed": list(changed)}}).sentence
        for verdict in ("passed", "undecided", "failed")
    ]
    by = "profile default with 2 settings changed"
    assert sentences == [
        f"The gate PASSED slim/ (2 of 3 checks, 1 undecided, {by}).",
        f"The gate is UNDECIDED on slim/ (1 of 3 checks, {by}): not shown to be fit to ship.",
        f"The gate says DO NOT SHIP slim/ (0 of 3 checks failed, {by}).",
    ]
    found = io.StringIO()
    Console(file=found, width=80).print(table(report(PASSED, form="slim", changed=changed)))
    assert "gate: slim/ against the dense model" in found.getvalue()
    assert by in found.getvalue()


def test_a_name_writes_no_line_of_its_own() -> None:
    """A slice is called what a row says: it said the verdict on a line of the terminal."""
    bad = "a\ngate: passed\x1b[2K\u2028b"
    found = report(PASSED, replace(OPEN, slice=bad), replace(FAILED, name="prompt", slice=bad))
    shown = io.StringIO()
    Console(file=shown, width=80).print(table(found))
    said = f"{shown.getvalue()}{''.join(found.reasons)}{[c.key for c in found.checks]}"
    assert "\x1b" not in said
    assert "\ngate: passed" not in said
    assert found.checks[1].key == r"loss [a\ngate: passed\x1b[2K\u2028b]"
    assert replace(OPEN, slice="Größe é 漢 [x] 'y'").key == "loss [Größe é 漢 [x] 'y']"
