"""A folder's tokenizer.json and tokenizer_config.json, as tokenizers and transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_TEXTS = ("tokenizer_class",)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json with every default written out, the ids that tokens really have, and a merge
    that stands twice where it counts; a normalizer of one step is that step, and of none is none
    (DeepSeek's). Raises ValueError, naming the file, for one that is not
    there or that tokenizers refuses."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # It raises no other class.
        raise ValueError(
            f"{path} is none that tokenizers reads ({error}); expected what save_pretrained "
            "writes: put it back, or save the tokenizer again"
        ) from error
    read: dict[str, Any] = json.loads(loaded.to_str())
    words, kept = loaded.get_vocab_size(with_added_tokens=False), len(read["model"]["vocab"])
    if kept < words:
        raise ValueError(f"{path}: {words} words have {kept} ids; expected one id for each")
    read["normalizer"] = _one_step(read["normalizer"])
    return read


def _one_step(step: dict[str, Any] | None) -> dict[str, Any] | None:
    match step:
        case {"type": "Sequence", "normalizers": []}:
            return None
        case {"type": "Sequence", "normalizers": [only]}:
            return _one_step(only)
    return step


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none, which is what transformers makes of it.
    Raises ValueError, naming the file, for values that are no tokens or texts."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        read: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(read, dict):
            raise ValueError(f"expected an object, found {type(read).__name__}")
        for key in (*_SPECIAL, *_TEXTS):
            found = read.get(key)
            text = found.get("content") if isinstance(found, dict) and key in _SPECIAL else found
            if found is not None and not isinstance(text, str):
                raise ValueError(f"its {key} is {found!r}; expected a text")
        added = read.get("added_tokens_decoder") or {}
        if not isinstance(added, dict) or not all(isinstance(t, dict) for t in added.values()):
            raise ValueError("its added_tokens_decoder has no token for every id")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; put it back, or save the tokenizer again") from error
    return read
