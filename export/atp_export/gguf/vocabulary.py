"""A BPE tokenizer as llama.cpp reads it: on bytes, or SentencePiece's (sentencepiece.py).

Of bytes llama.cpp splits text by one of its own rules before BPE, named by `tokenizer.ggml.pre`.
The name follows from the pre-tokenizer of tokenizer.json: `PRE_TOKENIZERS` has those whose rule is
the same (llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe). A tokenizer that is not in it is
refused: a near rule gives other ids, and no error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from atp_export.gguf.sentencepiece import NOT_MERGED, is_sentencepiece, scores, space_prefix
from atp_export.pre_tokenizers import PRE_TOKENIZERS, name_of, steps_of
from atp_export.put_around import put_around, special_token, token_ids

NFC = {"type": "NFC"}


def write_vocabulary(writer: GGUFWriter, folder: Path, size: int, ends: Sequence[int]) -> None:
    """Tokens, merges or scores, special ids and chat template of a checkpoint's folder.

    size: rows of the embedding; those without a token are written as unused. ends: ids of the end
    tokens. Raises ValueError for a tokenizer that llama.cpp has no rule for.
    """
    check_vocabulary(folder)
    tokenizer = _tokenizer(folder)
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    if is_sentencepiece(tokenizer):
        _write_scores(writer, tokenizer, names, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
        merges = tokenizer["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    unknown = tokenizer["model"].get("unk_token")
    writer.add_token_types([_type(i, names, added, unknown) for i in range(size)])
    _write_special(writer, folder, {token: i for i, token in names.items()}, ends)
    writer.add_add_bos_token(adds_bos(folder))
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _write_scores(
    writer: GGUFWriter, tokenizer: dict[str, Any], names: dict[int, str], size: int
) -> None:
    found = scores(tokenizer)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([found.get(names.get(i, ""), NOT_MERGED) for i in range(size)])
    writer.add_add_space_prefix(space_prefix(tokenizer))


def _write_special(
    writer: GGUFWriter, folder: Path, ids: dict[str, int], ends: Sequence[int]
) -> None:
    settings = _settings(folder)
    named = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        text = special_token(settings, key)
        if text in ids:
            named[key] = ids[text]
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("pad_token", writer.add_pad_token_id),
        ("unk_token", writer.add_unk_token_id),
    ):
        if key in named:
            add(named[key])
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(adders, kept_ends(named.get("eos_token"), ends), strict=False):
        add(end)


def kept_ends(own: int | None, ends: Sequence[int]) -> list[int]:
    """The end tokens that a file has keys for, three at most: the tokenizer's own first."""
    return [end for end in dict.fromkeys([own, *ends]) if end is not None][:3]


def check_vocabulary(folder: Path) -> None:
    """Raise ValueError for a tokenizer that llama.cpp has no rule for."""
    tokenizer = _tokenizer(folder)
    try:
        _check_added(tokenizer)
        if is_sentencepiece(tokenizer):
            space_prefix(tokenizer)
            scores(tokenizer)
        else:
            _check_bytes(tokenizer)
        _check_first(tokenizer, special_token(_settings(folder), "bos_token"))
    except ValueError as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from error


def _check_added(tokenizer: dict[str, Any]) -> None:
    for token in tokenizer["added_tokens"]:
        if token["lstrip"] or token["rstrip"]:
            raise ValueError(
                f"{token['content']} takes white space beside it away, which llama.cpp does for "
                "tokens of a few models by their names alone"
            )
        if token["single_word"]:
            raise ValueError(
                f"{token['content']} stands for whole words alone, which llama.cpp does not ask"
            )


def _check_first(tokenizer: dict[str, Any], bos: str | None) -> None:
    before, _ = put_around(tokenizer)
    ids = token_ids(tokenizer)
    if before and before != [ids.get(bos or "")]:
        texts = {i: text for text, i in ids.items()}
        raise ValueError(
            f"it puts {' '.join(texts[i] for i in before)} before every text, and a GGUF file has "
            f"room for its bos_token ({bos}) alone"
        )


def _check_bytes(tokenizer: dict[str, Any]) -> None:
    _pre_tokenizer(tokenizer)
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    if normalizer not in (None, NFC):
        raise ValueError(f"its normalizer ({normalizer['type']}) is none that llama.cpp has")
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(key):
            raise ValueError(f"its {key} ({model[key]!r}) is nothing that llama.cpp knows")


def other_ids_in_llama_cpp(folder: Path) -> str | None:
    """For what text llama.cpp gives other ids, without an error, as a sentence; None: for none
    that is known."""
    if _tokenizer(folder).get("normalizer") != NFC:
        return None
    return (
        "llama.cpp gives other ids, and no error, for text that is not in NFC (letters with "
        "combining marks, as some systems write them): normalize it first"
    )


def _settings(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return read


def _tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: a GGUF file holds its tokenizer")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """The name of llama.cpp's rule. Raises ValueError where none is known to be the same."""
    known = name_of(tokenizer)
    if known is None:
        steps = [step.get("type") for step in steps_of(tokenizer)]
        raise ValueError(
            f"its pre-tokenizer ({steps}) is none that llama.cpp is known to split alike; known "
            f"are those of {', '.join(PRE_TOKENIZERS.values())}"
        )
    return known


def adds_bos(folder: Path) -> bool:
    """Whether the tokenizer itself puts its first token before a text."""
    return bool(put_around(_tokenizer(folder))[0])


def _type(i: int, names: dict[int, str], added: dict[int, Any], unknown: str | None) -> TokenType:
    if i not in names:
        return TokenType.UNUSED
    if unknown is not None and names[i] == unknown:
        return TokenType.UNKNOWN
    if unknown is not None and re.fullmatch(r"<0x[0-9A-F]{2}>", names[i]):
        return TokenType.BYTE
    if i not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
