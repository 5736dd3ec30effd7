"""Plans as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from atp_edge.model.families import model_shape
from atp_edge.model.plan import plan_of, read_plan, write_plan
from tests.tiny import masks_of, tiny_model


def test_a_plan_there_and_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = plan_of(model_shape(model.config), [(0, 2), (1, 5), (1,), (0,), (2,), (7, 9)])
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    # What readers of the first schema know stays as it was, byte for byte.
    start = '{"schema": 1, "family": "llama", "sites": [\n  {"layer": 0, "kind": "attention", '
    assert (tmp_path / "plan.json").read_text().startswith(start)
    assert [int(m.sum()) for m in masks_of(plan)] == [s.width for s in plan.sites]
    (tmp_path / "plan.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match="not a plan"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_of_rope_pairs_says_so_under_a_schema_of_its_own(tmp_path: Path) -> None:
    shape = model_shape(tiny_model("llama").config)
    plan = plan_of(shape, [(0, 7), (1, 5), (1,), (0,), (2,), (7, 9)], "head-dims")
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    assert text.startswith('{"schema": 2, "family": "llama", "space": "head-dims", "sites": [\n')
    (tmp_path / "plan.json").write_text(text.replace('"schema": 2', '"schema": 1'))
    with pytest.raises(ValueError, match="schema 1, expected 2"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"kept": [0, 7]', '"kept": [[]]'),
        ('"kept": [0, 7]', '"kept": [0, 7.0]'),
        ('"kept": [0, 7]', '"kept": [false, true]'),
        ('"kept": [0, 7]', '"kept": 7'),
        ('"kept": [0, 7]', '"keeps": [0, 7]'),
        ('"layer": 0', '"layer": "0"'),
        ('"sites": [', '"sites": [7, '),
        ('"space": "head-dims"', '"space": ["head-dims"]'),
        ("{", "[{"),
        ('"family": "llama"', '"family": "\udcff"'),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, before: str, after: str) -> None:
    shape = model_shape(tiny_model("llama").config)
    plan = plan_of(shape, [(0, 7), (1, 5), (1,), (0,), (2,), (7, 9)], "head-dims")
    file = tmp_path / "plan.json"
    write_plan(plan, file)
    text = file.read_text()
    assert before in text
    file.write_bytes(text.replace(before, after, 1).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{file} is not a plan of atp-edge"):
        read_plan(file)
