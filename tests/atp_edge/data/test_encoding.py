"""Token ids: those of transformers for the same text, each token once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from atp_edge.data import encoding
from atp_edge.data.chat import Chat
from atp_edge.data.documents import Document, Segment
from atp_edge.data.encoding import (
    Encoder,
    added_around,
    check_tokenizer,
    document_start,
    prompt_ids,
)
from atp_edge.data.forms import Conversation, content_of
from tests.tiny_tokenizers import KINDS, TEMPLATES, tokenizer_of

BOS, EOS, IM_END = 0, 1, 3
TEXT = "You may copy,\n\nand  sell.\n é 日本 "
MESSAGES = [
    {"role": "user", "content": "May I copy?\n"},
    {"role": "assistant", "content": "Yes, you may."},
    {"role": "user", "content": " And sell\n\ncopies? "},
    {"role": "assistant", "content": "Also yes, 日本."},
]


@pytest.fixture(scope="module")
def smol(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


def text_document(text: str, *, parse: bool = False) -> Document:
    return Document((Segment(text, parse=parse),))


def chat_document(
    tokenizer: Any, messages: list[dict[str, str]], *, parse: bool = False
) -> Document:
    content = content_of({"messages": messages}, chat_template=True)
    assert isinstance(content, Conversation)
    return Document(Chat(tokenizer, parse).segments(content), rendered=True)


def learned(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != -100]))


@pytest.mark.parametrize(("kind", "bos"), itertools.product(KINDS, (True, False)))
def test_a_document_is_what_transformers_makes_of_its_text_and_the_end(
    kind: str, bos: bool
) -> None:
    tokenizer = tokenizer_of(kind, bos=bos)
    ids, labels = Encoder(tokenizer).encode(text_document(TEXT))
    assert ids == [*tokenizer(TEXT)["input_ids"], EOS]
    assert ids.count(BOS) == bos
    assert labels == ([-100, *ids[1:]] if bos else ids)
    assert prompt_ids(tokenizer, TEXT) == tokenizer(TEXT)["input_ids"] == ids[:-1]
    assert document_start(tokenizer) == ([BOS] if bos else [EOS])


def test_smollm2_adds_nothing(smol: Any) -> None:
    ids, labels = Encoder(smol).encode(text_document(TEXT))
    assert ids == labels == [*smol(TEXT)["input_ids"], smol.eos_token_id]
    assert smol.bos_token_id not in ids
    assert document_start(smol) == [smol.eos_token_id]
    assert added_around(smol) == ([], [])


@pytest.mark.parametrize(("kind", "name"), itertools.product(KINDS, TEMPLATES))
def test_a_conversation_is_what_apply_chat_template_makes_of_it(kind: str, name: str) -> None:
    tokenizer = tokenizer_of(kind, template=TEMPLATES[name])
    document = chat_document(tokenizer, MESSAGES)
    ids, labels = Encoder(tokenizer).encode(document)
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    # A template that writes no end token gets the tokenizer's.
    assert ids == (theirs if name != "words alone" else [*theirs, EOS])
    assert prompt_ids(tokenizer, document.text, rendered=True) == theirs
    words = learned(tokenizer, labels)
    assert "Yes, you may." in words
    assert "Also yes, 日本." in words
    assert "May I" not in words
    assert "sell" not in words
    assert ids.count(BOS) == (1 if name == "llama-3" else 2 if name == "llama-2" else 0)


def test_the_demo_model_s_conversations(smol: Any) -> None:
    ids, labels = Encoder(smol).encode(chat_document(smol, MESSAGES))
    assert ids == smol.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert learned(smol, labels) == "Yes, you may.<|im_end|>Also yes, 日本.<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_special_token_text_is_text_unless_it_is_asked_for(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    typed = "end with <|im_end|> here </s>"
    ids, _ = Encoder(tokenizer).encode(text_document(typed))
    assert (ids.count(BOS), ids.count(IM_END), ids.count(EOS)) == (1, 0, 1)
    assert tokenizer.decode(ids[1:-1]) == typed
    parsed, _ = Encoder(tokenizer).encode(text_document(typed, parse=True))
    assert parsed == tokenizer(typed)["input_ids"]
    assert (parsed.count(IM_END), parsed.count(EOS)) == (1, 1)


@pytest.mark.parametrize(("kind", "name"), itertools.product(KINDS, TEMPLATES))
def test_special_token_text_in_a_conversation_is_text(kind: str, name: str) -> None:
    tokenizer = tokenizer_of(kind, template=TEMPLATES[name])
    typed = [m | {"content": f"{m['content'].strip()} <|im_end|></s><s>"} for m in MESSAGES]
    plain, _ = Encoder(tokenizer).encode(chat_document(tokenizer, MESSAGES))
    document = chat_document(tokenizer, typed)
    ids, labels = Encoder(tokenizer).encode(document)
    assert [i for i in ids if i < 4] == [i for i in plain if i < 4]
    # Some tokenizers put a space after a special token, or take it.
    whole = "".join(tokenizer.decode(ids).split())
    assert whole.removesuffix("</s>") == "".join(document.text.split()).removesuffix("</s>")
    assert learned(tokenizer, labels).count("<|im_end|></s><s>") == 2
    parsed, _ = Encoder(tokenizer).encode(chat_document(tokenizer, typed, parse=True))
    theirs = tokenizer.apply_chat_template(typed, tokenize=True, return_dict=False)
    assert parsed[: len(theirs)] == theirs


def test_rows_rendered_beforehand_begin_and_end_once() -> None:
    tokenizer = tokenizer_of("llama-3", template=TEMPLATES["llama-3"])
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    ids, _ = Encoder(tokenizer).encode(text_document(rendered + "\n", parse=True))
    assert ids == tokenizer(rendered + "\n", add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, rendered) == prompt_ids(tokenizer, rendered, rendered=True)


def test_a_tokenizer_that_adds_the_end_adds_it_once_and_to_no_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("llama-3")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    ids, _ = Encoder(tokenizer).encode(text_document(TEXT))
    assert ids == tokenizer(TEXT)["input_ids"]
    assert prompt_ids(tokenizer, TEXT) == ids[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_read_together_are_what_each_is_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every form, two of them alike, in turn and in parts; no more are taken than are wanted."""
    tokenizer = tokenizer_of(kind, template=TEMPLATES["llama-3"])
    monkeypatch.setattr(encoding, "_CHARACTERS", 60)
    answered = (Segment("May I? <|im_end|>", learn=False), Segment("Yes,  you may."))
    some = [
        text_document(TEXT),
        chat_document(tokenizer, MESSAGES),
        Document(answered),
        text_document(TEXT, parse=True),
        text_document(TEXT),
        chat_document(tokenizer, MESSAGES[:2]),
        text_document("x"),
    ]
    encoder = Encoder(tokenizer)
    assert list(encoder.encode_all(some)) == [encoder.encode(one) for one in some]
    assert list(encoder.encode_all([])) == []
    left = iter(some)
    next(encoder.encode_all(left))
    assert list(left) == some[2:], "the first alone has too few characters"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("May I copy?", " Yes, you may."),
        ("May I copy? ", "Yes"),
        ("cop", "ies"),
        ("", "Yes"),
        ("a\n", "\nb"),
    ],
)
def test_a_prompt_has_the_ids_it_is_asked_with(kind: str, prompt: str, completion: str) -> None:
    tokenizer = tokenizer_of(kind)
    document = Document((Segment(prompt, learn=False), Segment(completion)))
    ids, labels = Encoder(tokenizer).encode(document)
    asked = prompt_ids(tokenizer, prompt)
    assert ids[: len(asked)] == asked
    assert labels == [-100] * len(asked) + ids[len(asked) :]
    assert ids[-1] == EOS
    assert Encoder(tokenizer).continued(prompt, completion) == (asked, ids[len(asked) : -1])
    assert Encoder(tokenizer).context(prompt) == asked
    if prompt or kind in ("byte-level", "llama-3"):  # others read "Yes" alone as " Yes"
        assert tokenizer.decode(ids[1:-1]) == prompt + completion


def test_a_tokenizer_without_an_end_or_with_ids_beyond_the_embeddings_is_refused(
    real_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    check_tokenizer(tokenizer, 49152)
    check_tokenizer(tokenizer, 49280)  # padded
    tokenizer.add_tokens(["<law>"])
    with pytest.raises(
        ValueError, match=r"token '<law>' has the id 49152 and .* 49152 rows \(1 su"
    ):
        check_tokenizer(tokenizer, 49152)
    check_tokenizer(tokenizer, 49153)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no eos_token, which ends every document"):
        check_tokenizer(tokenizer)
