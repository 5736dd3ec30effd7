"""What the gate leaves: a table, JSON that its schema describes, JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from atp_edge.gate.results import Check, GateReport, judged_by, key_of
from atp_edge.run.files import write_atomically, write_json

SCHEMA_FILE = Path(__file__).with_name("gate.schema.json")
GATE_JSON, JUNIT = "gate.json", "gate.xml"
STYLE = {"passed": "green", "failed": "red", "undecided": "yellow"}
_NUMBERS = ("dense", "slim", "difference", "limit")
# XML 1.0 has no place for these, whatever a model writes or a file is called.
_NO_XML = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(0xD800, 0xE000), 65534, 65535], "�"
)


def write_outputs(report: GateReport, folder: Path) -> None:
    """gate.xml and gate.json in the run's folder, the verdict last."""
    write_junit(report, folder / JUNIT)
    write_json(folder / GATE_JSON, report.to_dict())


def write_junit(report: GateReport, path: Path) -> None:
    """A test case a check: failed ones are failures; undecided ones are too where they keep the
    verdict open, else they are skipped."""
    suite = ElementTree.Element(
        "testsuite",
        name="atp-edge gate",
        tests=str(len(report.checks)),
        failures=str(sum(_fails(check, report) for check in report.checks)),
        skipped=str(sum(_skips(check, report) for check in report.checks)),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"gate.{check.name}".translate(_NO_XML),
            name=check.key.translate(_NO_XML), time="0",
        )  # fmt: skip
        text = check.text.translate(_NO_XML)
        if _fails(check, report):
            ElementTree.SubElement(case, "failure", message=text, type=check.status)
        elif _skips(check, report):
            ElementTree.SubElement(case, "skipped", message=text)
    ElementTree.indent(suite)
    write_atomically(path, ElementTree.tostring(suite, encoding="unicode", xml_declaration=True))


def _fails(check: Check, report: GateReport) -> bool:
    open_one = check.status == "undecided" and (check.required or report.undecided_fails)
    return check.status == "failed" or open_one


def _skips(check: Check, report: GateReport) -> bool:
    return check.status == "undecided" and not _fails(check, report)


def schema() -> dict[str, Any]:
    """The JSON schema of gate.json."""
    found: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return found


def rows_of(checks: Sequence[Check | dict[str, Any]]) -> list[list[str]]:
    """(check, status, dense, slim, difference, limit, documents) of every check, as text."""
    rows = []
    for check in checks:
        values = check if isinstance(check, dict) else vars(check)
        named = key_of(values["name"], values["slice"])
        numbers = ["" if values[key] is None else f"{values[key]:.3f}" for key in _NUMBERS]
        rows.append([named, values["status"], *numbers, str(values["clusters"])])
    return rows


def table(report: GateReport) -> Table:
    """The checks for a terminal of 80 columns."""
    shown = Table(
        title=f"gate: {report.form}/ against the dense model\n"
        f"{judged_by(report.profile, report.changed)}",
        title_justify="left",
    )
    shown.add_column("", overflow="fold", max_width=24)
    shown.add_column("", no_wrap=True)
    for name in ("dense", "slim", "worse", "limit", "of"):
        shown.add_column(name, justify="right", no_wrap=True)
    for named, status, *numbers in rows_of(report.checks):
        shown.add_row(Text(named), Text(status, style=STYLE[status]), *numbers)
    return shown
