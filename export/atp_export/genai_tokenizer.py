"""What onnxruntime-genai's own tokenizer makes of a tokenizer.json, without an error.

Read in onnxruntime-extensions (operators/tokenizer/bpe_kernels.cc, `SpmTokenize`), which genai 0.18
has inside, and held by tests. A SentencePiece tokenizer is BPE over a whole text; there it is BPE
over pieces that Llama 3's expression cuts, whose last space goes to the next word. One like
Gemma's, whose pre-tokenizer splits at a string, is cut between words, those of 10 characters and
more together, and after 100 in any case (a character without a piece counts its bytes); and a pair
is merged everywhere in a piece at once, so that long runs of spaces halve.

Only tokenizers of the very shapes that tests compare are described; of any other it is said that
it was not compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atp_export.gguf.sentencepiece import AT_SPACES, ESCAPED, PREFIX
from atp_export.pre_tokenizers import name_of, steps_of
from atp_export.put_around import put_around, special_token, token_ids

LIKE_GEMMA = "32 or more spaces in a row, and for more than 90 bytes without a space or a new line"
LIKE_LLAMA = (
    "two or more spaces (or '▁') in a row, for a space at the beginning, and for text beside an "
    "added token"
)
_OTHER = "onnxruntime-genai's own tokenizer gives other ids, and no error, for"
NOT_COMPARED = (
    "onnxruntime-genai's own tokenizer was not compared with one like this: it may give other ids "
    "without an error, or not load it"
)
_ADVICE = (
    "where that matters, give it the ids of tokenizers.Tokenizer.from_file('tokenizer.json'), with "
    "add_special_tokens=False for what a template has rendered"
)
_GEMMA = (ESCAPED, AT_SPACES | {"behavior": "MergedWithPrevious", "invert": False})
_LLAMA = (
    ({"type": "Sequence", "normalizers": [PREFIX, ESCAPED]}, None),
    (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
)
"""(normalizer, pre-tokenizer)."""
_BY_CLASS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes by whose names genai puts BOS, whatever the tokenizer does."""
_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_CLASSES_OF_BYTES = ("GPT2Tokenizer", "Qwen2Tokenizer")


def other_ids_in_genai(folder: Path) -> str | None:
    """For what text it gives other ids than the tokenizer of an exported folder, as a sentence;
    None: for none that is known."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    settings = folder / "tokenizer_config.json"
    read = [json.loads(file.read_text(encoding="utf-8")) for file in (path, settings)]
    named = _named(*read)
    return named and f"{named}: {_ADVICE}"


def _named(tokenizer: dict[str, Any], settings: dict[str, Any]) -> str | None:
    model, shape = tokenizer["model"], (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    if model["type"] != "BPE" or not _puts_bos_alone(tokenizer, settings):
        return NOT_COMPARED
    twice = len({*map(str, model["merges"])}) < len(model["merges"])
    if twice or settings.get("split_special_tokens"):
        return NOT_COMPARED
    if not model.get("byte_fallback"):
        return None if _splits_alone(tokenizer) and not _strips(tokenizer) else NOT_COMPARED
    if any(f"<0x{i:02X}>" not in model["vocab"] for i in range(256)):
        return NOT_COMPARED
    if shape in _LLAMA:
        return f"{_OTHER} {LIKE_LLAMA}"
    return f"{_OTHER} {LIKE_GEMMA}" if shape == _GEMMA and not _strips(tokenizer) else NOT_COMPARED


def _puts_bos_alone(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether BOS or nothing is put before a text, as genai does it, and nothing after one."""
    try:
        before, after = put_around(tokenizer)
    except ValueError:
        return False
    bos = token_ids(tokenizer).get(special_token(settings, "bos_token") or "")
    kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
    plain = _CLASSES if tokenizer["model"].get("byte_fallback") else _CLASSES + _CLASSES_OF_BYTES
    expected = [[bos]] if kind in _BY_CLASS else [[], [bos]] if kind in plain else []
    return before in expected and not after


def _splits_alone(tokenizer: dict[str, Any]) -> bool:
    """Whether text is split as by those tokenizers of bytes that were compared, and no more: genai
    leaves normalizers, single digits and marks of a word's end out."""
    steps = steps_of(tokenizer)
    return (
        name_of(tokenizer) is not None
        and tokenizer.get("normalizer") is None
        and not tokenizer["model"].get("end_of_word_suffix")
        and not any(step.get("type") == "Digits" for step in steps)
        and (len(steps) > 1 or steps[0].get("use_regex", True))
    )


def _strips(tokenizer: dict[str, Any]) -> bool:
    """Whether an added token asks something of the text beside it, which genai leaves out too."""
    asked = ("lstrip", "rstrip", "single_word")
    return any(token.get(key) for token in tokenizer["added_tokens"] for key in asked)
