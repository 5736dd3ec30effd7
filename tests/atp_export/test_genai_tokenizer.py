"""Text that onnxruntime-genai's own tokenizer gives other ids is named; no other text gets them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from atp_export.genai_tokenizer import (
    LIKE_GEMMA,
    LIKE_GPT4O,
    LIKE_LLAMA,
    LIKE_LLAMA3,
    LIKE_SMOLLM2,
    NOT_COMPARED,
    other_ids_in_genai,
)
from atp_export.pre_tokenizers import name_of
from tokenizers import Tokenizer

from atp_edge.data.encoding import prompt_ids
from atp_edge.run.files import read_json
from tests.atp_export.runtimes.cells import passages
from tests.tiny_tokenizers import (
    CORPUS,
    put_around_texts,
    renamed_special,
    save_changed,
    save_learned,
    tokenizer_of,
)

SPACED = [f"a{sign * n}software" for sign in " \n\t" for n in (2, 7, 31)]
PLAIN = ["You may copy and sell copies", "a\nfree of charge.", *passages(), *SPACED,
         f"a, of the {'software' * 11}of", f"of the {'本ソ' * 13} software",
         "don't I'LL\r\n\r\n\tx = 12,345.67 é e\u0301 日本語の文章 😀\u00a0 "]  # fmt: skip
BESIDE_TOKENS = ["a</s>b", "a</s> b<s>", "a</s>\u00a0b", "a</s>\u3000b", "a</s>\x0cb", "a▁b ▁"]
APART = [re.sub(" +", " ", text).strip() for text in PLAIN]
"""The same with one space at a time."""
LONG_RUN = f"a{' ' * 32}software"
UNBROKEN = "You" * 40
COMPARED = {
    "byte-level": [],
    "llama-bpe": [LIKE_LLAMA3],
    "smaug-bpe": [LIKE_LLAMA3],
    "qwen2": [LIKE_LLAMA3],
    "gpt-4o": [LIKE_LLAMA3, LIKE_GPT4O],
    "tekken": [LIKE_LLAMA3, LIKE_GPT4O],
}
"""Tokenizers of bytes, and the texts for which they have other ids."""
SENTENCEPIECE = ("llama-2", "metaspace", "phi-3")


def genai_of(folder: Path) -> Any:
    """genai's own tokenizer of a folder's files."""
    genai = pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    model = {"type": "llama", "vocab_size": 800, "context_length": 64,
             "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    theirs = genai.Tokenizer(str(folder))
    # What a template has rendered is encoded as it is, which is its default; a text is not.
    theirs.update_options(add_special_tokens="true")
    return theirs


def both_ids(folder: Path, kind: str, texts: list[str], *, bos: bool = True) -> list[Any]:
    """(genai's, ours) of every text."""
    tokenizer = tokenizer_of(kind, bos=bos)
    tokenizer.save_pretrained(folder)
    theirs = genai_of(folder)
    return [(theirs.encode(text).tolist(), prompt_ids(tokenizer, text)) for text in texts]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        *((kind, [*PLAIN, *BESIDE_TOKENS, LONG_RUN, UNBROKEN]) for kind in COMPARED),
        ("gemma", [*PLAIN, *BESIDE_TOKENS]),
        *((kind, APART) for kind in SENTENCEPIECE),
    ],
)
def test_text_that_is_not_named_has_the_same_ids(
    tmp_path: Path, kind: str, texts: list[str], bos: bool
) -> None:
    for theirs, ours in both_ids(tmp_path, kind, texts, bos=bos):
        assert theirs == ours


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gemma", LONG_RUN),
        ("gemma", UNBROKEN),
        *((kind, "a  3 copies") for kind in SENTENCEPIECE),
        *((kind, "▁▁a") for kind in SENTENCEPIECE),
        ("metaspace", " a"),
        ("metaspace", "a</s>b"),
        ("phi-3", "a</s>\u3000b"),
        ("llama-3", "a. \n Copy"),
    ],
)
def test_text_that_is_named_has_other_ids(tmp_path: Path, kind: str, text: str) -> None:
    """Where this fails, genai has learned it: the warning and docs/runtimes.md can go."""
    ((theirs, ours),) = both_ids(tmp_path, kind, [text])
    assert theirs != ours


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("llama-3", NOT_COMPARED),
        ("gemma", LIKE_GEMMA),
        *((kind, LIKE_LLAMA) for kind in SENTENCEPIECE),
    ],
)
def test_a_folder_says_which(tmp_path: Path, kind: str, named: str | None) -> None:
    assert other_ids_in_genai(tmp_path) is None
    tokenizer_of(kind).save_pretrained(tmp_path)
    found = other_ids_in_genai(tmp_path)
    assert found is not None
    assert named in found


@pytest.mark.parametrize(("kind", "texts"), COMPARED.items())
@pytest.mark.parametrize("form", ["Isolated", "Removed"])
def test_a_tokenizer_of_bytes_says_for_which(
    tmp_path: Path, kind: str, texts: list[str], form: str
) -> None:
    """Removed: what lies between the parts of a text that the expression finds, which is nothing;
    cl100k and o200k are converted so, and OLMo's have it."""
    changes = {
        "pre_tokenizer.pretokenizers.0.behavior": form,
        "pre_tokenizer.pretokenizers.0.invert": form == "Removed",
    }
    save_changed(tmp_path, kind, {} if kind == "byte-level" else changes)
    assert kind == "byte-level" or name_of(read_json(tmp_path / "tokenizer.json")) == kind
    found = other_ids_in_genai(tmp_path) or ""
    assert [text for text in (LIKE_LLAMA3, LIKE_GPT4O) if text in found] == texts
    assert bool(found) == bool(texts)


BREAK = re.compile(r"[^\S\r\n][\r\n]+[^\S\r\n]")


def is_named(kind: str, text: str) -> bool:
    """Whether a text is one of those that are said to have other ids."""
    found = COMPARED[kind]
    without_case = any(category(sign) in ("Lo", "Lm", "Lt", "Mn", "Mc") for sign in text)
    return (LIKE_LLAMA3 in found and bool(BREAK.search(text))) or (
        LIKE_GPT4O in found and without_case
    )


@pytest.mark.parametrize("kind", COMPARED)
def test_no_other_drawn_text_has_other_ids(tmp_path: Path, kind: str) -> None:
    texts = save_learned(tmp_path, kind)
    theirs, ours = genai_of(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    others = [t for t in texts if theirs.encode(t).tolist() != ours.encode(t).ids]
    assert [text for text in others if not is_named(kind, text)] == []
    assert bool(others) == bool(COMPARED[kind])


DIGITS = {"type": "Digits", "individual_digits": True}
AT_DIGITS = {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ALONE = BYTES | {"use_regex": False}
NEVER = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
MARKS = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"},
                                           "content": " "}]}  # fmt: skip


def steps(*pre_tokenizers: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre_tokenizers]}}


def without(letter: str) -> dict[str, Any]:
    """A byte-level vocabulary with another sign in a letter's place."""
    return {"model.vocab": lambda ids: {"▁" if t == letter else t: i for t, i in ids.items()}}


def with_words(*words: str) -> dict[str, Any]:
    return {"model.vocab": lambda ids: ids | {w: len(ids) + i for i, w in enumerate(words)}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("byte-level", {"normalizer": {"type": "NFC"}}),
        ("byte-level", steps(DIGITS, BYTES)),
        ("byte-level", steps(DIGITS)),
        ("byte-level", steps()),
        ("smollm", {}),
        ("seed-coder", {}),
        ("deepseek-v3", {}),
        ("byte-level", steps(BYTES, BYTES)),
        ("byte-level", steps(BYTES_ALONE)),
        ("byte-level", {"pre_tokenizer": BYTES_ALONE}),
        ("qwen2", {"pre_tokenizer.pretokenizers": lambda found: found[:1]}),
        ("qwen2", {"pre_tokenizer.pretokenizers": lambda found: found[::-1]}),
        ("qwen2", {"pre_tokenizer.pretokenizers.1.use_regex": True}),
        ("qwen2", {"pre_tokenizer.pretokenizers.0.invert": True}),
        ("gemma", {"pre_tokenizer": AT_DIGITS}),
        ("llama-2", {"pre_tokenizer": AT_DIGITS}),
        ("gemma", {"pre_tokenizer": None}),
        ("metaspace", {"pre_tokenizer": NEVER}),
        ("gemma", {"decoder": None}),
        ("gemma", {"added_tokens.4.normalized": True}),
        *((kind, {"post_processor": put_around_texts([], ["</s>"])}) for kind in
          ("byte-level", "gemma", "llama-2")),
        # GLM-4's [gMASK] <sop>.
        ("llama-bpe", {"post_processor": put_around_texts(["<s>", "</s>"], [])}),
        ("llama-bpe", {"post_processor": put_around_texts(["</s>"], [])}),
        ("byte-level", {"model.merges": lambda merges: [*merges, merges[0]]}),
        ("gemma", {"model.vocab": lambda ids: {t.lower(): i for t, i in ids.items()},
                   "model.merges": []}),
        ("byte-level", {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0]]}}),
        ("byte-level", {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0}}}),
        ("gemma", {"added_tokens.0.rstrip": True}),
    ],
)  # fmt: skip
def test_what_was_not_compared_is_said_to_be(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    save_changed(tmp_path, kind, changes)
    assert NOT_COMPARED in (other_ids_in_genai(tmp_path) or "")


@pytest.mark.parametrize(
    ("changes", "settings", "text", "named"),
    [
        (with_words("qz"), {}, "qz", NOT_COMPARED),
        (with_words("qz", "qzq") | {"model.merges": [["qz", "q"], ["q", "z"]]}, {}, "qzqz",
         NOT_COMPARED),
        (without("z"), {}, "az", NOT_COMPARED),
        (without("Ą"), {}, "a\x04", f"{LIKE_SMOLLM2}, here U+0004"),
        (renamed_special("qz", "qzx") | {"added_tokens.3.normalized": True}, {}, "qzx",
         NOT_COMPARED),
        ({"decoder": MARKS}, {}, "a b", NOT_COMPARED),
        ({"model.dropout": 0.9}, {}, " ".join(CORPUS), NOT_COMPARED),
        ({"added_tokens.0.id": 5}, {}, "a<s>", NOT_COMPARED),
        ({}, {"eos_token": "<s>"}, "a", NOT_COMPARED),
        ({}, {"eos_token": None}, "a", NOT_COMPARED),
        ({"post_processor": None}, {"bos_token": "l"}, "a", NOT_COMPARED),
        ({"post_processor": put_around_texts([], [])}, {"add_bos_token": True}, "a", NOT_COMPARED),
        ({}, {"add_eos_token": True}, "a", NOT_COMPARED),
        ({}, {"added_tokens_decoder": {"9": {"content": "may"}}}, "may", NOT_COMPARED),
    ],
)  # fmt: skip
def test_what_has_other_ids_is_named(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], text: str, named: str
) -> None:
    save_changed(tmp_path, "byte-level", changes, settings)
    assert named in (other_ids_in_genai(tmp_path) or "")
    theirs = genai_of(tmp_path).encode(text).tolist()
    assert theirs != Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize(
    "changes",
    [
        {"model.merges": lambda merges: [" ".join(merge) for merge in merges]},
        {"version": lambda _: "1.0", "padding": None},
        without("Á"),  # the byte C1, which is in no text
    ],
)
def test_a_file_of_before_is_read_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_changed(tmp_path, "byte-level", changes)
    assert other_ids_in_genai(tmp_path) is None


@pytest.mark.parametrize(
    ("kind", "bos", "settings", "named"),
    [
        ("byte-level", False, {"tokenizer_class": "GPT2Tokenizer"}, False),
        ("llama-bpe", True, {"tokenizer_class": "LlamaTokenizerFast"}, False),
        ("llama-bpe", False, {"tokenizer_class": "LlamaTokenizer"}, True),  # genai puts BOS
        ("llama-2", False, {"tokenizer_class": "LlamaTokenizer"}, True),
        ("gemma", True, {"tokenizer_class": "GPT2Tokenizer"}, True),
        ("llama-bpe", True, {"tokenizer_class": None}, True),
        ("llama-bpe", True, {"split_special_tokens": True}, True),
    ],
)
def test_what_the_configuration_says_counts(
    tmp_path: Path, kind: str, bos: bool, settings: dict[str, Any], named: bool
) -> None:
    save_changed(tmp_path, kind, {}, settings, bos=bos)
    assert (NOT_COMPARED in (other_ids_in_genai(tmp_path) or "")) == named
