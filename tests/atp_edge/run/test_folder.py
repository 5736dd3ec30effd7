"""A run's folder: which settings may change as it goes on, and which not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from atp_edge.config import Config
from atp_edge.pipeline.stages import run_stage
from atp_edge.run.folder import RunFolder, open_run
from atp_edge.run.records import STAGES
from atp_edge.settings import read_versions, with_values
from tests.tiny import Silent


def opened(folder: Path, **values: object) -> RunFolder:
    return open_run(with_values(Config(), {"out": str(folder / "run")} | values))


def test_what_training_does_not_read_may_change_and_the_rest_may_not(tmp_path: Path) -> None:
    versions = read_versions(opened(tmp_path).config_toml)
    run = opened(
        tmp_path, **{"export.precision": "int4", "bench.rounds": 2, "out": f"{tmp_path}/run/"}
    )
    assert run.config().export.precision == "int4"
    assert run.config().bench.rounds == 2
    assert read_versions(run.config_toml) == versions
    for key, value in (("seed", 1), ("lora.rank", 4), ("dataset.test_blocks", 3)):
        with pytest.raises(
            ValueError, match=rf"of another configuration \({key} = .* {key} = {value} here"
        ):
            opened(tmp_path, **{key: value})
    assert run.config().seed == 0


def test_a_budget_in_bytes_pins_what_the_bytes_depend_on(tmp_path: Path) -> None:
    budget = {"budget": "bytes=300MB"}
    opened(tmp_path, **budget)
    opened(tmp_path, **budget, **{"bench.rounds": 2})
    opened(tmp_path, **budget, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"export.context = 64 here: a budget in bytes counts"):
        opened(tmp_path, **budget, **{"export.context": 64})
    with pytest.raises(ValueError, match=r"export.precision = int8 here: a budget in bytes counts"):
        opened(tmp_path, **budget, **{"export.precision": "int8"})


def test_model_and_data_are_compared_by_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened(tmp_path, data="notes.jsonl")
    opened(tmp_path, data=str(tmp_path / "notes.jsonl"))
    with pytest.raises(ValueError, match=r"data = .*/notes.jsonl there, data = other.jsonl here"):
        opened(tmp_path, data="other.jsonl")


def test_a_run_whose_settings_are_lost_is_not_gone_on_with(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.add_part("other", {"perplexity": 2.0})
    run.config_toml.unlink()
    with pytest.raises(ValueError, match=r"config.toml is gone, and there is more of its run"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps = 'x'", "config.toml: steps = 'x': expected int"),
        (b"stops = 1", "config.toml: unknown setting 'stops'"),
        (b"model = 'caf\xe9'", "config.toml is not TOML"),
        (b"steps = ", "config.toml is not TOML"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.toml").write_bytes(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{message}"):
        RunFolder(tmp_path).config()


def test_a_command_that_is_told_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "my runs")
    with pytest.raises(ValueError, match="holds no run") as told:
        run.config()
    command = run.command("export", "--to", "a b")
    assert shlex.split(command.strip("`"))[2:] == ["--out", str(run.path), "--to", "a b"]
    assert run.command("run") in str(told.value)
    run.path.mkdir()
    run.config_toml.touch()
    assert shlex.split(run.command("run").strip("`"))[2:] == ["--config", str(run.config_toml)]


def test_a_folder_in_the_place_of_a_file_is_refused_before_the_stage_works(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.check_places(STAGES)
    for name in ("domain.npz", "plan.json", "report.html", "metrics.json"):
        (run.path / name).mkdir()
        with pytest.raises(ValueError, match=rf"{name} is a folder, and a file is written there"):
            run.check_places(STAGES)
        with pytest.raises(ValueError, match=rf"{name} is a folder"):
            run_stage("train" if name == "plan.json" else "gate", run.config(), run, Silent())
        (run.path / name).rmdir()
