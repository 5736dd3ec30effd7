"""What a command is asked to write is refused before its work where it cannot or must not lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.cli.written import check_apart, new_file
from atp_edge.config import Config
from atp_edge.pipeline.export_to import check_target
from atp_edge.run.files import check_place
from atp_edge.run.folder import RunFolder
from atp_edge.settings import to_toml, with_values


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
    beside = tmp_path / "judged.json"
    assert new_file(beside) == beside
    assert new_file(None) is None


@pytest.mark.parametrize(
    "name",
    ["config.toml", "metrics.json", "stages.json", "gate.json", "domain.npz", "checkpoint/x.json"],
)
def test_no_file_of_a_run_is_written_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert new_file(path) == path
    (tmp_path / "config.toml").touch()
    with pytest.raises(ValueError, match="is the run's own; name another place"):
        new_file(path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is the run's own; name another place"):
        new_file(tmp_path / "link" / name)


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    data, folder, new = tmp_path / "data.jsonl", tmp_path / "model", tmp_path / "new.json"
    data.touch()
    folder.mkdir()
    check_apart({"--json": new, "--junit": None}, [data, folder, "legal", ""])
    with pytest.raises(ValueError, match=r"^--json .*data.jsonl is read here; name another"):
        check_apart({"--json": folder / ".." / "data.jsonl"}, [data])
    with pytest.raises(ValueError, match=r"^--junit .*model is read here; name another"):
        check_apart({"--junit": folder / "x" / "gate.xml"}, [folder])
    with pytest.raises(ValueError, match=r"^--json and --junit both name .*; name two files"):
        check_apart({"--json": new, "--junit": folder / ".." / "new.json"})


@pytest.mark.parametrize("command", [("gate",), ("bench",), ("bench", "rounding"),
                                     ("bench", "losses"), ("bench", "tasks")])  # fmt: skip
def test_a_run_s_text_is_not_written_over(tmp_path: Path, command: tuple[str]) -> None:
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    data.write_text("kept")
    config = with_values(Config(), {"data": str(data), "model": str(tmp_path), "out": str(run)})
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config, {}))
    done = CliRunner().invoke(app, [*command, "--out", str(run), "--json", str(data)])
    assert "is read here; name another place" in str(done.exception)
    assert data.read_text() == "kept"


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


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a device or the like, and would be replaced"):
            new_file(path)
