"""`atp-edge generate`: what it asks the model, and what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from tests.tiny_tokenizers import CHATML, tokenizer_of

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class Answering:
    """A generator that remembers what it was asked, and gives these pieces."""

    pieces: tuple[str, ...] = ("Yes", ".")
    asked: Any = None
    domain: Any = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.tokenizer = tokenizer_of("byte-level", template=CHATML)

    def stream(self, prompt: Any, **_: Any) -> Iterator[str]:
        Answering.asked = prompt
        return iter(self.pieces)


@pytest.fixture(autouse=True)
def _answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atp_export.runtime.Generator", Answering)


def generate(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(
        app, ["generate", *arguments, "--out", str(folder)], catch_exceptions=False
    )
    assert done.exit_code == 0
    return done.stdout


def test_a_text_is_shown_with_what_follows(tmp_path: Path) -> None:
    assert generate(tmp_path, "May I?") == "May I?Yes.\n"
    assert Answering.asked == "May I?"


def test_a_prompt_and_an_answer_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name between colons becomes a picture, no bracket a style, and no line is broken."""
    monkeypatch.setattr(Answering, "pieces", (" :tada:", " [/bold] ", "y" * 300))
    prompt = "[bold] :smile: " + "x " * 150
    assert generate(tmp_path, prompt) == f"{prompt} :tada: [/bold] {'y' * 300}\n"


def test_a_prompt_that_is_refused_is_not_shown_before_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> Iterator[str]:
        raise ValueError("0 new tokens: expected 1 or more")
        yield ""

    monkeypatch.setattr(Answering, "stream", refuses)
    done = CliRunner().invoke(app, ["generate", "May I?", "--out", str(tmp_path)])
    assert isinstance(done.exception, ValueError)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--temperature", "nan"), "temperature = nan: expected 0"),
        (("--temperature", "-1"), "temperature = -1.0: expected 0"),
        (("--top-p", "0"), "top_p = 0.0: expected more than 0"),
        (("--top-k", "-3"), "top_k = -3: expected 0 or more"),
        (("--seed", "-1"), "seed = -1: expected 0 or more"),
        (("--fallback", "nowhere"), "--fallback: nowhere is no folder; expected"),
        (("--fallback", "."), "--fallback: . holds no model.onnx; expected"),
        (("--fallback", "pyproject.toml"), "--fallback: pyproject.toml is a file; expected"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_read(
    tmp_path: Path, arguments: tuple[str, ...], error: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        generate(tmp_path, "May I?", *arguments)


def test_what_a_user_types_into_a_chat_is_text(tmp_path: Path) -> None:
    assert generate(tmp_path, f"May I? {IM_END}", "--chat") == "Yes.\n"
    tokenizer = tokenizer_of("byte-level", template=CHATML)
    end, start = tokenizer.convert_tokens_to_ids([IM_END, IM_START])
    assert Answering.asked.count(end) == 1, "the template's own"
    assert Answering.asked.count(start) == 2
    assert IM_END in tokenizer.decode(Answering.asked[: Answering.asked.index(end)])


def test_a_model_that_writes_special_tokens_alone_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "pieces", ("",))
    assert "(no text: every new token is a special one)" in generate(tmp_path, "May I?")
