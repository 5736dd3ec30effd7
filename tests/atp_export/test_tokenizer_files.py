"""Odd tokenizer files: read as tokenizers reads them, or one error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atp_export.genai_tokenizer import other_ids_in_genai
from atp_export.gguf.vocabulary import checked_tokenizer
from atp_export.tokenizer_files import read_settings, read_tokenizer

from tests.tiny_tokenizers import SPECIAL, save_changed

CHECKS = (other_ids_in_genai, checked_tokenizer)
ODD = (None, {}, [], 0, "")


def without(*keys: str) -> Any:
    return lambda found: {key: value for key, value in found.items() if key not in keys}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is none that tokenizers reads"),
        ("tokenizer.json", "[]", "tokenizer.json is none that tokenizers reads"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: Expecting"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected an object, found list"),
        ("tokenizer_config.json", '{"bos_token": {}}', "its bos_token is {}; expected a text"),
        ("tokenizer_config.json", '{"tokenizer_class": 1}', "its tokenizer_class is 1"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": "<s>"}}', "no token for every"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [0]}', "no token for every id"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, check: Any, name: str, text: str, message: str
) -> None:
    save_changed(tmp_path, "qwen2", {})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        check(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer.pretokenizers.0": without("type")},
        {"added_tokens.0": without("content")},
        {"added_tokens.0": without("id")},
        {"added_tokens.0": without("lstrip")},
        {"added_tokens": None},
        {"model": without("merges")},
        {"model.vocab": lambda ids: ids | {"a": ids["b"]}},
    ],
)
def test_what_tokenizers_refuses_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_changed(tmp_path, "qwen2", changes)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "1.0", "padding": None},
        {"model": without("type", "dropout", "ignore_merges", "byte_fallback")},
        {"model.merges": lambda merges: [*merges[:1], *merges]},
    ],
)
def test_what_is_left_out_is_what_tokenizers_takes(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_changed(tmp_path, "qwen2", {})
    whole = read_tokenizer(tmp_path)
    save_changed(tmp_path, "qwen2", changes)
    assert read_tokenizer(tmp_path)["model"] == whole["model"]
    checked_tokenizer(tmp_path)


def test_without_settings_a_tokenizer_has_no_special_tokens(tmp_path: Path) -> None:
    save_changed(tmp_path, "qwen2", {}, bos=False)
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_settings(tmp_path) == {}
    checked_tokenizer(tmp_path)
    assert "not compared" in (other_ids_in_genai(tmp_path) or "")


def places(held: Any) -> Iterator[tuple[Any, Any]]:
    """(what holds a value, its key), of two of a long list or dict."""
    keys = [*held] if isinstance(held, dict) else [*range(len(held))]
    for key in keys if len(keys) < 20 else keys[:2]:
        yield held, key
        if isinstance(held[key], (dict, list)):
            yield from places(held[key])


def damaged(whole: dict[str, Any]) -> Iterator[str]:
    """With one value gone, or another; as JSON."""
    for held, key in [*places(whole)]:
        own = held[key]
        for odd in ODD:
            held[key] = odd
            yield json.dumps(whole)
        del held[key]
        yield json.dumps(whole)
        if isinstance(held, dict):
            held[key] = own
        else:
            held.insert(key, own)


def few_words(whole: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of letters and three merges."""
    model = whole["model"]
    merges = model["merges"][:3]
    kept = {*SPECIAL, *("".join(merge) for merge in merges)}
    words = [word for word in model["vocab"] if len(word) == 1 or word in kept]
    vocab = {word: i for i, word in enumerate(words)}
    return whole | {"model": model | {"merges": merges, "vocab": vocab}}


def said_by(check: Any, folder: Path) -> str | None:
    """The one error that a check may end in."""
    try:
        check(folder)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_value_is_read_or_named(tmp_path: Path, name: str) -> None:
    save_changed(tmp_path, "qwen2", {})
    few = few_words(json.loads((tmp_path / "tokenizer.json").read_text()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(few))
    checked_tokenizer(tmp_path)
    for changed in damaged(json.loads((tmp_path / name).read_text())):
        (tmp_path / name).write_text(changed)
        for said in (said_by(check, tmp_path) for check in CHECKS):
            assert said is None or str(tmp_path / "tokenizer") in said
