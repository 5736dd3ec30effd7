"""One TOML file, every key a flag, and errors that name the nearest key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atp_edge.config import RECIPES, Config
from atp_edge.settings import configured, keys, read_config, to_toml, with_values


def test_toml_there_and_back(tmp_path: Path) -> None:
    config = with_values(Config(), {"lora.rank": 8, "budget": "bytes=300MB", "train.clip": 2})
    path = tmp_path / "a.toml"
    path.write_text(to_toml(config, {"torch": "2.13"}))
    assert read_config(path) == config
    assert config.train.clip == 2.0


def test_every_key_has_help_a_flag_of_its_own_and_a_default_that_passes() -> None:
    found = list(keys())
    assert len({key.flag for key in found}) == len(found) > 30
    assert all(key.help for key in found)
    assert with_values(Config(), {key.name: key.default for key in found}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora.rnk": 8}, r"unknown setting 'lora.rnk'; the nearest known one is 'lora.rank'"),
        ({"widths": "tall"}, r"widths = 'tall': expected one of uniform, per-layer"),
        ({"steps": "many"}, r"steps = 'many': expected int"),
        ({"steps": 0}, r"steps = 0: expected 1 or more"),
        ({"lora.lr": -1.0}, r"lora.lr = -1.0: expected more than 0"),
        ({"lora.lr": -1}, r"lora.lr = -1.0: expected more than 0"),
        ({"lora.lr": 0}, r"lora.lr = 0.0: expected more than 0"),
        ({"lora.lr": float("nan")}, r"lora.lr = nan: expected more than 0"),
        ({"lora.lr": float("inf")}, r"lora.lr = inf: expected more than 0"),
        ({"lora.alpha": 0}, r"lora.alpha = 0.0: expected more than 0"),
        ({"train.clip": 0}, r"train.clip = 0.0: expected more than 0"),
        ({"train.warmup": 2}, r"train.warmup = 2.0: expected 0 or more, 1 at most"),
        ({"train.patience": 9}, r"train.patience = 9.0: expected 0 or more, 1 at most"),
        ({"decision.temperature": 0}, r"decision.temperature = 0.0: expected more than 0"),
        ({"decision.control_share": 1.5}, r"control_share = 1.5: expected 0 or more, 1 at most"),
        ({"seed": 99999999999999999999}, r"seed = 9+: expected 0 or more, 4294967295 at most"),
        ({"dataset.block_tokens": 1}, r"dataset.block_tokens = 1: expected 2 or more"),
        ({"dataset.special_tokens": "maybe"}, r"expected one of text, parse"),
        ({"decision.width_multiple": 0}, r"decision.width_multiple = 0: expected 1 or more"),
        ({"bench.threads": -1}, r"bench.threads = -1: expected 0 or more"),
        ({"decision.control_share": -0.5}, r"control_share = -0.5: expected 0 or more"),
        (
            {"data": os.fsdecode(b"\xff.jsonl")},
            r"data = '\\udcff.jsonl': no UTF-8, and config.toml",
        ),
        ({"recovery.retrain": 1}, r"recovery.retrain = 1: expected bool"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_values(Config(), values)


def test_what_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("model = ")
    with pytest.raises(ValueError, match="is not TOML"):
        read_config(tmp_path / "a.toml")
    with pytest.raises(ValueError, match="no such file"):
        read_config(tmp_path / "b.toml")


def test_the_demo_configuration_is_valid() -> None:
    assert read_config(Path(__file__).parents[2] / "examples" / "demo.toml").steps > 0


def test_a_recipe_lies_under_what_is_said_and_comes_back_from_its_file(tmp_path: Path) -> None:
    fast = configured({"recipe": "fast", "decision.interval": 3})
    assert fast.decision.interval == 3
    assert fast.recovery.distill == RECIPES["fast"]["recovery.distill"] != Config().recovery.distill
    assert configured({"recipe": "best", "steps": 5}).steps == 5
    assert configured({}) == configured({"recipe": "balanced"}) == Config()
    (tmp_path / "run.toml").write_text(to_toml(fast))
    assert read_config(tmp_path / "run.toml") == fast


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_names_settings_that_exist(recipe: str) -> None:
    assert configured({"recipe": recipe}).recipe == recipe


@pytest.mark.parametrize(("steps", "said", "every"), [(200, 0, 50), (40_000, 0, 1000), (200, 5, 5)])
def test_a_long_run_has_no_more_checkpoints_than_a_short_one(
    steps: int, said: int, every: int
) -> None:
    config = with_values(Config(), {"steps": steps, "train.save_every": said})
    assert config.save_every == every
