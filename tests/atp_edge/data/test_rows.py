"""Rows of every kind of file, each with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from atp_edge.data.rows import Row, rows_of


def rows(folder: Path, name: str, text: str) -> list[Row]:
    path = folder / name
    path.write_text(text, newline="")
    return list(rows_of(path))


def values(found: list[Row]) -> list[Any]:
    return [row.value for row in found]


def lines(found: list[Row]) -> list[str]:
    return [row.place.rpartition(", ")[2] for row in found]


def test_jsonl_is_a_row_a_line(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.jsonl", '{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}\n')
    assert values(found) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    assert lines(found) == ["line 1", "line 3"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_a_row_an_element_with_the_line_of_each(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    data = [{"text": "one"}, {"text": "two, ]"}]
    found = rows(tmp_path, name, json.dumps(data, indent=indent))
    assert values(found) == data
    assert lines(found) == (["line 2", "line 5"] if indent else ["line 1", "line 1"])
    assert rows(tmp_path, name, " [ ] \n") == []


def test_one_object_over_several_lines_is_a_row(tmp_path: Path) -> None:
    assert values(rows(tmp_path, "a.json", '{\n "text": "a"\n}')) == [{"text": "a"}]
    assert lines(rows(tmp_path, "a.json", '{"text": "a"}\n{"text": "b"}')) == ["line 1", "line 2"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"text": ', "Expecting value"),
        ('{"text": "a"} x', "Extra data"),
        ('{"text": "a\tb"}', "Invalid control character"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_a_line_that_is_no_json_is_a_fault_and_the_others_stay(
    tmp_path: Path, text: str, fault: str
) -> None:
    found = rows(tmp_path, "a.jsonl", f'{{"text": "a"}}\n{text}\n{{"text": "b"}}')
    assert [bool(row.fault) for row in found] == [False, True, False]
    assert fault in found[1].fault


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"},\n{"text": ]', r"a.json, line 2: not JSON \(Expecting value\)"),
        (
            '[{"text": "a"}\n{"text": "b"}]',
            r"line 1: not JSON \(a row of the array is not followed",
        ),
        ('[{"text": "a"}]\n[{"text": "b"}]', "there is more after the array's end"),
        ("[" * 100_000, "line 1: not JSON .nested too deeply"),
        ("[", "line 1: not JSON"),
    ],
)
def test_a_broken_array_is_refused_whole(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, "a.json", text)


def test_csv_cells_are_text_and_may_hold_lines(tmp_path: Path) -> None:
    text = 'text,slice\n"a, ""b""\nc",x\n7,\n,y\nNA,z\n' + "d" * 200_000 + ",w\n"
    found = rows(tmp_path, "a.csv", "\ufeff" + text)
    assert [value["text"][:9] for value in values(found)] == ['a, "b"\nc', "7", "", "NA", "d" * 9]
    assert lines(found) == ["line 2", "line 4", "line 5", "line 6", "line 7"]


def test_csv_rows_of_another_width_and_open_quotes_are_named(tmp_path: Path) -> None:
    wide, short = rows(tmp_path, "a.csv", "text,slice\na,b,c\nd\n")
    assert "more cells than the header" in wide.fault
    assert short.value == {"text": "d", "slice": None}
    with pytest.raises(ValueError, match=r"a.csv, line 3: not CSV \(unexpected end of data\)"):
        rows(tmp_path, "a.csv", 'text\na\n"b\n')


def test_tables_of_objects_have_no_nulls_that_nobody_wrote(tmp_path: Path) -> None:
    calls = [{"function": {"name": "w"}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}]
    table = datasets.Dataset.from_list([{"messages": messages}, {"messages": None}])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "several")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "several", arrow):
        found = list(rows_of(path))
        assert values(found) == [{"messages": messages}, {"messages": None}]
        assert lines(found) == ["row 0", "row 1"]


def test_of_a_folder_every_file_is_read_or_those_for_training(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\nno\n')
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("a\n\n\n\nc\n")
    (tmp_path / "README.md").write_text("of the data")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "a.png").write_bytes(b"x")
    found = list(rows_of(tmp_path))
    assert [row.value and row.value["text"] for row in found] == ["a", "c", "b", None]
    assert found[3].place == f"{tmp_path / 'b.jsonl'}, line 2"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.jsonl").write_text('{"text": "d"}\n')
    assert values(list(rows_of(tmp_path))) == [{"text": "d"}]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "folder"])
def test_damaged_tables_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"PAR1 no table at all PAR1")
    with pytest.raises(ValueError, match=rf"{name}: "):
        list(rows_of(path))


def test_plain_text_is_a_document_between_blank_lines(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.md", "\ufeffone\r\nline\r\n\r\ntwo\n \nthree\n\n\n")
    assert values(found) == [{"text": "one\nline"}, {"text": "two"}, {"text": "three"}]
    assert lines(found) == ["document 1", "document 2", "document 3"]
    wide = rows(tmp_path, "a.txt", "one\n\nstill\n\n\ntwo\n\n\nthree")
    assert [value["text"] for value in values(wide)] == ["one\n\nstill", "two", "three"]
