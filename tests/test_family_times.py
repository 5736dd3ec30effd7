"""docs/families.md has every family, and is what pytest's records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.family_times import PAGE, Ran, counted, family_of, render
from tests.tiny import FAMILIES, NEW_FAMILIES

RECORD = """<testsuites><testsuite>
<testcase name="test_narrow_equals_onnx[llama-biases-uniform-ort-fp32]" time="1.6"/>
<testcase name="test_narrow_equals_onnx[llama-uniform-ort-fp32]" time="2"/>
<testcase name="test_narrow_equals_onnx_in_every_cell[llama-uniform-ort-int4]" time="3"/>
<testcase name="test_llama_cpp_agrees[qwen3-uniform]" time="9"><skipped/></testcase>
<testcase name="test_of_something_else[llama]" time="9"/></testsuite></testsuites>"""


def test_a_record_is_counted_by_family_and_check(tmp_path: Path) -> None:
    record = tmp_path / "record.xml"
    record.write_text(RECORD)
    found = counted(record)
    assert found == {
        ("llama-biases", "narrow = ONNX"): Ran(1, 1.6),
        ("llama", "narrow = ONNX"): Ran(2, 5.0),
    }
    page = render({("llama", "narrow = ONNX"): Ran(1, 2.0)}, found)
    assert "| llama | - | 1 in 2 + 2 in 5 | - | - | - |" in page
    assert "| llama-biases | - | + 1 in 2 | - | - | - |" in page
    record.write_text(RECORD.replace("<skipped/>", "<failure/>"))
    with pytest.raises(ValueError, match=r"test_llama_cpp_agrees\[qwen3-uniform\] failed"):
        counted(record)


def test_the_page_has_every_family() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "|" in line]
    assert rows[2:] == [*FAMILIES, *NEW_FAMILIES]
    assert family_of("test_gemma_3_is_trained") == "gemma3"
