"""A BPE tokenizer as llama.cpp reads it: on bytes, or SentencePiece's (sentencepiece.py).

Of bytes llama.cpp splits text by one of its own rules before BPE, named by `tokenizer.ggml.pre`.
The name follows from the pre-tokenizer of tokenizer.json: `PRE_TOKENIZERS` has those whose rule is
the same, or is said where it is not (llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe).
A tokenizer that is not in it is refused: a near rule gives other ids, and no error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from atp_export.added_tokens import inside, overlapping
from atp_export.byte_letters import without_token
from atp_export.gguf.sentencepiece import (
    NOT_MERGED,
    check_pieces,
    is_sentencepiece,
    scores,
    space_prefix,
)
from atp_export.pre_tokenizers import PRE_TOKENIZERS, name_of, steps_of
from atp_export.put_around import put_around, special_token, token_ids
from atp_export.tokenizer_files import FILE, SETTINGS, read_settings, read_tokenizer

NFC = {"type": "NFC"}
_ASCII_CASES = ("gpt-4o", "tekken")
"""Rules whose classes of letters are A to Z, a to z and all others, and marks none, there."""


def write_vocabulary(
    writer: GGUFWriter, folder: Path, tokenizer: dict[str, Any], size: int, ends: Sequence[int]
) -> None:
    """Tokens, merges or scores, special ids and chat template of a checkpoint's folder.

    tokenizer: what `checked_tokenizer` made of the folder. size: rows of the embedding; those
    without a token are written as unused. ends: ids of the end tokens.
    """
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    if is_sentencepiece(tokenizer):
        _write_scores(writer, tokenizer, names, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    unknown = tokenizer["model"]["unk_token"]
    writer.add_token_types([_type(i, names, added, unknown) for i in range(size)])
    _write_special(writer, folder, {token: i for i, token in names.items()}, ends)
    writer.add_add_bos_token(adds_bos(tokenizer))
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
    settings = read_settings(folder)
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


def checked_tokenizer(folder: Path) -> dict[str, Any]:
    """The contents of tokenizer.json. Raises ValueError for a tokenizer that llama.cpp has no rule
    for, or that cannot be read."""
    tokenizer, settings = read_tokenizer(folder), read_settings(folder)
    try:
        _check_added(tokenizer)
        if is_sentencepiece(tokenizer):
            check_pieces(tokenizer)
        else:
            _check_bytes(tokenizer)
        _check_model(tokenizer["model"])
        _check_inside(tokenizer)
        put_before = _check_around(tokenizer, special_token(settings, "bos_token"))
    except ValueError as error:
        raise ValueError(f"{folder / FILE}: {error}") from error
    _check_settings(folder / SETTINGS, settings, put_before=put_before)
    return tokenizer


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


def _check_inside(tokenizer: dict[str, Any]) -> None:
    for whole, part in inside(tokenizer):
        raise ValueError(
            f"its added token {part['content']!r} is found in {whole['content']!r} and before it "
            "(which is normalized), where llama.cpp takes the longer one"
        )


def _overlap(tokenizer: dict[str, Any]) -> str | None:
    """Two added tokens of which llama.cpp takes the other one where they overlap."""
    for first, second in overlapping(tokenizer):
        longer = len(second["content"]) >= len(first["content"])
        if longer or first["normalized"] != second["normalized"]:
            return f"{first['content']!r} and {second['content']!r}"
    return None


def _check_model(model: dict[str, Any]) -> None:
    """What BPE may do on bytes as on SentencePiece's pieces, and llama.cpp does not."""
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model[key]:
            raise ValueError(f"its {key} ({model[key]!r}) is nothing that llama.cpp knows")
    if model["dropout"]:
        raise ValueError(
            f"its dropout is {model['dropout']}: it leaves merges out by chance, which llama.cpp "
            "does not; set it to null"
        )
    if not model["merges"]:
        raise ValueError("it has no merges, and llama.cpp loads no BPE without")


def _check_around(tokenizer: dict[str, Any], bos: str | None) -> bool:
    """Whether BOS is put before every text; nothing else may be put."""
    before, after = put_around(tokenizer)
    ids = token_ids(tokenizer)
    texts = {i: text for text, i in ids.items()}
    if before and before != [ids.get(bos or "")]:
        raise ValueError(
            f"it puts {_named(before, texts)} before every text, and a GGUF file has room for its "
            f"bos_token ({bos}) alone; where the chat template writes them, take them out of the "
            "post_processor before training"
        )
    if after:
        raise ValueError(
            f"it puts {_named(after, texts)} after every text, and llama.cpp's own programs stop "
            "at a decoder that does; take it out of the post_processor: training ends every "
            "document with the end token in any case"
        )
    return bool(before)


def _named(ids: Sequence[int], texts: dict[int, str]) -> str:
    return " ".join(texts.get(i, f"the unknown id {i}") for i in ids)


def _check_settings(path: Path, settings: dict[str, Any], *, put_before: bool) -> None:
    """That transformers, which reads these too, does nothing else than tokenizer.json says."""
    if settings.get("split_special_tokens"):
        raise ValueError(
            f"{path}: split_special_tokens is on, and llama.cpp reads special tokens in a text"
        )
    for key, put in (("add_bos_token", put_before), ("add_eos_token", False)):
        named = special_token(settings, key.removeprefix("add_"))
        if named and settings.get(key) not in (None, put):
            raise ValueError(
                f"{path}: {key} is {settings[key]}, and {FILE} puts {'one' if put else 'none'}; "
                "save the tokenizer again with transformers"
            )


def _check_bytes(tokenizer: dict[str, Any]) -> None:
    _pre_tokenizer(tokenizer)
    normalizer = tokenizer["normalizer"]
    if normalizer not in (None, NFC):
        raise ValueError(f"its normalizer ({normalizer['type']}) is none that llama.cpp has")
    for token in tokenizer["added_tokens"] if normalizer else ():
        if token["normalized"] and not unicodedata.is_normalized("NFC", token["content"]):
            raise ValueError(f"{token['content']!r} is looked for in NFC, and llama.cpp has none")


def other_ids_in_llama_cpp(tokenizer: dict[str, Any]) -> str | None:
    """For what text llama.cpp gives other ids, without an error, as a sentence; None: for none
    that is known."""
    texts = []
    if tokenizer["normalizer"] == NFC:
        texts.append(
            "text that is not in NFC (letters with combining marks, as some systems write them; "
            "normalize it first)"
        )
    if name_of(tokenizer) in _ASCII_CASES:
        texts.append("words with marks, or with capitals and letters beyond ASCII (नमस्ते, ÉCOLE)")
    if not is_sentencepiece(tokenizer) and (lacking := without_token(tokenizer)):
        texts.append(f"text with bytes that have no token ({bytes(lacking).hex(' ')})")
    if overlap := _overlap(tokenizer):
        texts.append(f"text in which added tokens overlap (of {overlap}, say)")
    if not texts:
        return None
    return f"llama.cpp gives other ids, and no error, for {', and for '.join(texts)}"


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


def adds_bos(tokenizer: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts its first token before a text."""
    return bool(put_around(tokenizer)[0])


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
