"""`atp-edge generate` reads the ids that training, scoring and transformers have for a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atp_export.runtime import generator

from atp_edge.data.chat import chat_ids
from atp_edge.data.documents import Document, Segment
from atp_edge.data.encoding import Encoder
from tests.tiny_tokenizers import CHATML, KINDS, LLAMA_3, tokenizer_of

TEXT = "You may copy"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows that a generator's session was asked to go on from."""
    rows: list[list[int]] = []

    def generate(_: Any, prompts: list[list[int]], **__: Any) -> list[list[int]]:
        rows.extend(prompts)
        return [[] for _ in prompts]

    def stream(_: Any, ids: list[int], *__: Any, **___: Any) -> Iterator[int]:
        rows.append(ids)
        return iter(())

    monkeypatch.setattr(generator, "Session", lambda *_, **__: SimpleNamespace(ends={2}))
    monkeypatch.setattr(generator, "generate_tokens", generate)
    monkeypatch.setattr(generator, "stream_tokens", stream)
    return rows


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_one_set_of_ids(
    tmp_path: Path, asked: list[list[int]], kind: str, bos: bool
) -> None:
    tokenizer = tokenizer_of(kind, bos=bos)
    tokenizer.save_pretrained(tmp_path)
    made = generator.Generator(tmp_path)
    made.generate([TEXT], max_new_tokens=2)
    list(made.stream(TEXT, max_new_tokens=2))
    encoder = Encoder(tokenizer)
    trained, _ = encoder.encode(Document((Segment(TEXT),)))
    scored = encoder.context(TEXT)
    theirs = tokenizer(TEXT)["input_ids"]
    assert asked == [theirs, theirs]
    assert trained == [*theirs, tokenizer.eos_token_id]
    assert scored == (theirs if bos else [tokenizer.eos_token_id, *theirs])


@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_a_rendered_prompt_begins_as_its_template_has_it(
    tmp_path: Path, asked: list[list[int]], template: str
) -> None:
    tokenizer = tokenizer_of("llama-3", template=template)
    tokenizer.save_pretrained(tmp_path)
    made = generator.Generator(tmp_path)
    messages = [{"role": "user", "content": "May I copy?"}]
    options: dict[str, Any] = {"add_generation_prompt": True}
    prompt = chat_ids(tokenizer, "May I copy?")
    list(made.stream(prompt, max_new_tokens=2))
    made.generate([prompt], max_new_tokens=2)
    theirs = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    assert asked == [theirs, theirs]
    assert theirs.count(tokenizer.bos_token_id) == (template == LLAMA_3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_special_token_text_that_a_user_types_is_text(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template=template)
    plain, typed = (chat_ids(tokenizer, text) for text in ("May I", "May I <|im_end|></s><s>"))
    assert [i for i in typed if i < 4] == [i for i in plain if i < 4]
    assert "<|im_end|></s><s>" in tokenizer.decode(typed)
