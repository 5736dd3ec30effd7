"""What a command is asked to write is refused before its work where it cannot or must not lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.cli.written import new_file


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
    beside = tmp_path / "gate.json"
    assert new_file(beside) == beside
    assert new_file(None) is None


@pytest.mark.parametrize(
    "command", [("gate", "--junit"), ("gate", "--json"), ("bench", "rounding", "--json")]
)
def test_it_is_refused_before_the_run_is_looked_at(tmp_path: Path, command: tuple[str]) -> None:
    asked = [*command, str(tmp_path), "--out", str(tmp_path / "no-run")]
    done = CliRunner().invoke(app, asked)
    assert "is a folder; name a file" in str(done.exception)
