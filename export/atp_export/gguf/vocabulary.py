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
        writer.add_tokenizer_pre(pre_tokenizer(folder))
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
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(key)
        text = token["content"] if isinstance(token, dict) else token
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
    stripping = [t["content"] for t in tokenizer["added_tokens"] if t["lstrip"] or t["rstrip"]]
    if stripping:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: {stripping[0]} takes white space beside it away, which "
            "llama.cpp does for tokens of a few models by their names alone"
        )
    if not is_sentencepiece(tokenizer):
        pre_tokenizer(folder)
        return
    try:
        space_prefix(tokenizer)
        scores(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from error


def _tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there: a GGUF file holds its tokenizer")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def pre_tokenizer(folder: Path) -> str:
    """The name of llama.cpp's rule. Raises ValueError where none is known to be the same."""
    tokenizer = _tokenizer(folder)
    known = name_of(tokenizer)
    if known is None:
        steps = [step.get("type") for step in steps_of(tokenizer)]
        raise ValueError(
            f"{folder / 'tokenizer.json'}: its pre-tokenizer ({steps}) is none that llama.cpp is "
            f"known to split alike; known are those of {', '.join(PRE_TOKENIZERS.values())}"
        )
    return known


def adds_bos(folder: Path) -> bool:
    """Whether the tokenizer itself puts a first token before a text."""
    post = _tokenizer(folder).get("post_processor") or {}
    steps = post.get("processors", [post])
    return any(
        "SpecialToken" in (step.get("single") or [{}])[0]
        for step in steps
        if step.get("type") == "TemplateProcessing"
    )


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
