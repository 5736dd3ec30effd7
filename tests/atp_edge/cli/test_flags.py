"""`--config` with a run's own config.toml: the run is where the file lies."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.cli.flags import _values_in
from atp_edge.config import Config
from atp_edge.gate.settings import read_gate_settings
from atp_edge.run.folder import open_run
from atp_edge.settings import with_values


def test_a_moved_run_goes_on_by_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(with_values(Config(), {"out": "here", "seed": 3}))
    run.add_part("other", {})
    assert _values_in(run.config_toml)["out"] == "here"
    (tmp_path / "here").rename(tmp_path / "there")
    assert _values_in(Path("there/config.toml"))["out"] == "there"
    assert _values_in(Path("there/config.toml"))["seed"] == 3


def test_a_configuration_that_is_no_run_s_says_where_the_run_is(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('out = "runs/notes"\n')
    assert _values_in(tmp_path / "config.toml") == {"out": "runs/notes"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[quality]\nloss = 0.2", "quality.loss"),
        ('data = ["more.jsonl"]\nprofile = "legal"', "profile"),  # data is a setting of both
    ],
)
def test_the_gate_s_settings_are_sent_to_the_gate_s_file(
    tmp_path: Path, text: str, key: str
) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(text)
    done = CliRunner().invoke(app, ["run", "--config", str(file)])
    assert str(done.exception) == (
        f"{file}: {key!r} is a setting of the gate; write the gate's settings into a file of "
        "their own, and name that with --gate-config"
    )


def test_a_run_s_file_is_no_file_of_thresholds(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('model = "demo"\n[lora]\nrank = 8\n')
    with pytest.raises(ValueError, match=r"config\.toml: 'model' is a setting of a run, not of"):
        read_gate_settings(file, {})


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("gate", "--out", "run"), "--profile"),
        (("gate", "--out", "run"), "--data"),
        (("gate", "--out", "run", "--data", "a.jsonl"), "--data"),
        (("gate", "--out", "run"), "--config"),
        (("gate",), "--out"),
        (("run",), "--protect"),
        (("train",), "--config"),
        (("bench", "--peers", "onnxruntime-genai"), "--out"),
        (("bench", "rounding", "--out", "run"), "--json"),
        (("generate", "text", "--out", "run"), "--fallback"),
        (("export", "--out", "run"), "--to"),
    ],
)
@pytest.mark.parametrize("nothing", ["", " "])
def test_an_option_without_its_value_is_refused(
    command: tuple[str, ...], option: str, nothing: str
) -> None:
    """As from a script's variable that is not set."""
    done = CliRunner().invoke(app, [*command, option, nothing])
    assert str(done.exception) == f"{option} is empty; give it a value, or leave it out"
