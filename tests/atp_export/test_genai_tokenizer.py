"""Text that onnxruntime-genai's own tokenizer gives other ids is named; no other text gets them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from atp_export.genai_tokenizer import LIKE_GEMMA, LIKE_LLAMA, NOT_COMPARED, other_ids_in_genai
from atp_export.pre_tokenizers import name_of

from atp_edge.data.encoding import prompt_ids
from atp_edge.run.files import read_json
from tests.atp_export.runtimes.cells import passages
from tests.tiny_tokenizers import tokenizer_of

SPACED = [f"a{sign * n}software" for sign in " \n\t" for n in (2, 7, 31)]
PLAIN = ["You may copy and sell copies", "a\nfree of charge.", *passages(), *SPACED,
         f"a, of the {'software' * 11}of", f"of the {'本ソ' * 13} software",
         "don't I'LL\r\n\r\n\tx = 12,345.67 é e\u0301 日本語の文章 😀\u00a0 "]  # fmt: skip
BESIDE_TOKENS = ["a</s>b", "a</s> b<s>", "a</s>\u00a0b", "a</s>\u3000b", "a</s>\x0cb", "a▁b ▁"]
APART = [re.sub(" +", " ", text).strip() for text in PLAIN]
"""The same with one space at a time."""
LONG_RUN = f"a{' ' * 32}software"
UNBROKEN = "You" * 40
COMPARED = ("byte-level", "llama-bpe", "smaug-bpe", "qwen2", "gpt-4o", "tekken")
"""Tokenizers of bytes."""
SENTENCEPIECE = ("llama-2", "metaspace", "phi-3")


def both_ids(folder: Path, kind: str, texts: list[str], *, bos: bool = True) -> list[Any]:
    """(genai's, ours) of every text."""
    genai = pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    tokenizer = tokenizer_of(kind, bos=bos)
    tokenizer.save_pretrained(folder)
    model = {"type": "llama", "vocab_size": len(tokenizer), "context_length": 64,
             "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    theirs = genai.Tokenizer(str(folder))
    # What a template has rendered is encoded as it is, which is its default; a text is not.
    theirs.update_options(add_special_tokens="true")
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
        *((kind, None) for kind in COMPARED),
        ("llama-3", NOT_COMPARED),
        ("gemma", LIKE_GEMMA),
        *((kind, LIKE_LLAMA) for kind in SENTENCEPIECE),
    ],
)
def test_a_folder_says_which(tmp_path: Path, kind: str, named: str | None) -> None:
    assert other_ids_in_genai(tmp_path) is None
    tokenizer_of(kind).save_pretrained(tmp_path)
    assert kind not in COMPARED[1:] or name_of(read_json(tmp_path / "tokenizer.json")) == kind
    found = other_ids_in_genai(tmp_path)
    assert found is None if named is None else found is not None and named in found


DIGITS = {"type": "Digits", "individual_digits": True}
AT_DIGITS = {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
TOLD = {"<s>": {"ids": [0]}, "</s>": {"ids": [1]}}


def around(before: list[str], after: list[str]) -> dict[str, Any]:
    """A tokenizer that puts tokens before and after a text."""
    first, last = ([{"SpecialToken": {"id": t}} for t in tokens] for tokens in (before, after))
    single = [*first, {"Sequence": {"id": "A"}}, *last]
    template = {"type": "TemplateProcessing", "single": single, "special_tokens": TOLD}
    return {"post_processor": template}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("byte-level", {"normalizer": {"type": "NFC"}}),
        ("byte-level", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}}),
        *((kind, {"pre_tokenizer": AT_DIGITS}) for kind in ("gemma", "llama-2")),
        ("gemma", {"pre_tokenizer": None}),
        ("metaspace", {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                                         "prepend_scheme": "never", "split": False}}),
        *((kind, around([], ["</s>"])) for kind in ("byte-level", "gemma", "llama-2")),
        ("llama-bpe", around(["<s>", "</s>"], [])),  # GLM-4's [gMASK] <sop>
        ("llama-bpe", around(["</s>"], [])),
        ("byte-level", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"], ["a", "b"]]}}),
        ("gemma", {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}}),
        *(("byte-level", {"model": {"type": kind}}) for kind in ("Unigram", "WordPiece")),
        ("gemma", {"added_tokens": [{"content": "<s>", "id": 0, "rstrip": True}]}),
    ],
)  # fmt: skip
def test_what_was_not_compared_is_said_to_be(
    tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    tokenizer_of(kind).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert NOT_COMPARED in (other_ids_in_genai(tmp_path) or "")


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
    tokenizer_of(kind, bos=bos).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert (NOT_COMPARED in (other_ids_in_genai(tmp_path) or "")) == named
