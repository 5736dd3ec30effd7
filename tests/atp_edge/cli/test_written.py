"""What a command is asked to write is refused before its work where it cannot or must not lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.cli.written import new_file
from atp_edge.pipeline.export_to import check_target
from atp_edge.run.files import check_place
from atp_edge.run.folder import RunFolder


def test_no_file_is_added_to_what_ships(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    shipped = tmp_path / "elsewhere"
    for folder in (tmp_path / "onnx", shipped / "deeper"):
        folder.mkdir(parents=True)
    (shipped / "manifest.json").touch()
    for path in (tmp_path / "onnx" / "gate.json", shipped / "deeper" / "x.json"):
        with pytest.raises(ValueError, match="ships as it is; name another place"):
            new_file(path)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        new_file(tmp_path)
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="notes is a file; name another place"):
        new_file(tmp_path / "notes" / "gate.json")
    beside = tmp_path / "gate.json"
    assert new_file(beside) == beside
    assert new_file(None) is None


def test_a_folder_of_another_user_is_no_place_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    check_place(tmp_path, "--to x")
    for path in (tmp_path / "x", tmp_path / "new" / "x"):
        with pytest.raises(ValueError, match=r"^--to x: .* may not be written to; name another"):
            check_place(path, "--to x")
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match=r"--to \S+/notes/x: \S+notes is a file"):
        check_target(RunFolder(tmp_path / "run"), tmp_path / "notes" / "x")


@pytest.mark.parametrize(
    "command", [("gate", "--junit"), ("gate", "--json"), ("bench", "rounding", "--json")]
)
def test_it_is_refused_before_the_run_is_looked_at(tmp_path: Path, command: tuple[str]) -> None:
    asked = [*command, str(tmp_path), "--out", str(tmp_path / "no-run")]
    done = CliRunner().invoke(app, asked)
    assert "is a folder; name a file" in str(done.exception)
