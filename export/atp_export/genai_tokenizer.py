"""What onnxruntime-genai's own tokenizer makes of a tokenizer.json, without an error.

Read in onnxruntime-extensions (operators/tokenizer/bpe_kernels.cc, `SpmTokenize`), which genai 0.18
has inside, and held by tests. Of bytes it splits text by code of its own in place of the regular
expression: white space up to the last new line and on, and letters by other classes; single digits
it leaves whole. A SentencePiece tokenizer is BPE over a whole text; there it is BPE
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

from atp_export.added_tokens import inside, overlapping
from atp_export.byte_letters import CONTROLS, code_points, without_token
from atp_export.gguf.sentencepiece import AT_SPACES, ESCAPED, PREFIX, changed
from atp_export.merges import made_in_order
from atp_export.pre_tokenizers import name_of
from atp_export.put_around import added_ids, put_around, special_token
from atp_export.tokenizer_files import FILE, read_settings, read_tokenizer

LIKE_GEMMA = "32 or more spaces in a row, and for more than 90 bytes without a space or a new line"
LIKE_LLAMA = (
    "two or more spaces (or '▁') in a row, for a space at the beginning, and for text beside an "
    "added token"
)
LIKE_SMOLLM2 = "control characters that have no token (their id is -1 there)"
LIKE_LLAMA3 = (
    "white space before and after a new line (a line of spaces alone or one that ends in a space, "
    "before one that begins with a space)"
)
LIKE_GPT4O = "words with letters that have no capitals (Chinese, Arabic, Hindi) or with marks"
_OTHER = "onnxruntime-genai's own tokenizer gives other ids, and no error, for"
NOT_COMPARED = (
    "onnxruntime-genai's own tokenizer was not compared with one like this: it may give other ids "
    "without an error, or not load it"
)
_ADVICE = (
    "where that matters, give `generator.append_tokens` the ids of "
    "`tokenizers.Tokenizer.from_file('tokenizer.json').encode(text).ids`, with "
    "`add_special_tokens=False` for what a template has rendered"
)
_GEMMA = (ESCAPED, AT_SPACES | {"behavior": "MergedWithPrevious", "invert": False})
_LLAMA = (
    ({"type": "Sequence", "normalizers": [PREFIX, ESCAPED]}, None),
    (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
)
"""(normalizer, pre-tokenizer)."""
_BACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
"""Steps of the decoder, from which genai takes that spaces are signs, and that one is put first."""
_COMPARED = {
    "gpt-2": (),
    "llama-bpe": (LIKE_LLAMA3,),
    "smaug-bpe": (LIKE_LLAMA3,),
    "qwen2": (LIKE_LLAMA3,),
    "gpt-4o": (LIKE_LLAMA3, LIKE_GPT4O),
    "tekken": (LIKE_LLAMA3, LIKE_GPT4O),
}
"""What tokenizers of bytes give other ids for, by the names of their splits."""
_BY_CLASS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""Classes by whose names genai puts BOS, whatever the tokenizer does."""
_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_CLASSES_OF_BYTES = ("GPT2Tokenizer", "Qwen2Tokenizer")


def other_ids_in_genai(folder: Path) -> str | None:
    """For what text it gives other ids than the tokenizer of an exported folder, as a sentence;
    None: for none that is known. Raises ValueError, naming the file, for one that cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    tokenizer, settings = read_tokenizer(folder), read_settings(folder)
    plain = _says_no_more(json.loads(path.read_bytes()), tokenizer)
    named = _named(tokenizer, settings) if plain else NOT_COMPARED
    return named and f"{named}; {_ADVICE}"


def _named(tokenizer: dict[str, Any], settings: dict[str, Any]) -> str | None:
    model, shape = tokenizer["model"], (tokenizer["normalizer"], tokenizer["pre_tokenizer"])
    if model["type"] != "BPE" or model["dropout"] or not _puts_bos_alone(tokenizer, settings):
        return NOT_COMPARED
    others = (settings.get("added_tokens_decoder") or {}).values()
    more = any(token.get("content") not in added_ids(tokenizer) for token in others)
    pairs = overlapping(tokenizer)
    late = any(first["normalized"] != second["normalized"] for first, second in pairs)
    late = late or any(True for _ in inside(tokenizer))
    if more or late or settings.get("split_special_tokens"):
        return NOT_COMPARED
    if not model["byte_fallback"]:
        return _named_of_bytes(tokenizer)
    if any(f"<0x{i:02X}>" not in model["vocab"] for i in range(256)) or changed(tokenizer):
        return NOT_COMPARED
    back = (tokenizer["decoder"] or {}).get("decoders")
    if shape in _LLAMA and back == [*_BACK, _STRIP]:
        return f"{_OTHER} {LIKE_LLAMA}"
    like_gemma = shape == _GEMMA and back == _BACK and not _strips(tokenizer)
    return f"{_OTHER} {LIKE_GEMMA}" if like_gemma else NOT_COMPARED


def _named_of_bytes(tokenizer: dict[str, Any]) -> str | None:
    lacking, name = without_token(tokenizer), name_of(tokenizer)
    known = _splits_alone(tokenizer) and not _strips(tokenizer) and made_in_order(tokenizer)
    if name not in _COMPARED or not known or not set(lacking) <= CONTROLS:
        return NOT_COMPARED
    texts = [*_COMPARED[name]]
    if lacking:
        texts.append(f"{LIKE_SMOLLM2}, here {code_points(lacking)}")
    return f"{_OTHER} {', and for '.join(texts)}" if texts else None


def _says_no_more(raw: Any, read: Any) -> bool:
    """Whether a file says nothing but what tokenizers makes of it: genai reads the file itself."""
    if isinstance(raw, dict) and isinstance(read, dict):
        return all(key in read and _says_no_more(raw[key], read[key]) for key in raw)
    if isinstance(raw, list) and isinstance(read, list):
        return len(raw) == len(read) and all(map(_says_no_more, raw, read))
    merge = isinstance(raw, str) and isinstance(read, list)
    return bool(raw == (" ".join(read) if merge else read))


def _puts_bos_alone(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether BOS or nothing is put before a text, as genai does it, and nothing after one.

    It puts BOS and EOS whose text stands anywhere in the post-processor, and those of the settings.
    """
    try:
        before, after = put_around(tokenizer)
    except ValueError:
        return False
    bos, eos = (special_token(settings, key) or "" for key in ("bos_token", "eos_token"))
    kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
    plain = _CLASSES if tokenizer["model"]["byte_fallback"] else _CLASSES + _CLASSES_OF_BYTES
    post = json.dumps(tokenizer["post_processor"], ensure_ascii=False)
    if kind not in _BY_CLASS + plain or after or settings.get("add_eos_token"):
        return False
    if settings.get("add_bos_token") not in (None, bool(before)):
        return False
    if not bos:
        return not before and kind in plain
    puts = kind in _BY_CLASS or bos in post
    return before == ([added_ids(tokenizer).get(bos)] if puts else []) and eos not in post


def _splits_alone(tokenizer: dict[str, Any]) -> bool:
    """Whether nothing but the pre-tokenizer splits text: genai leaves normalizers and marks of a
    word's end out."""
    model, back = tokenizer["model"], tokenizer["decoder"] or {"type": "ByteLevel"}
    return (
        tokenizer["normalizer"] is None
        and back["type"] == "ByteLevel"
        and not (model["end_of_word_suffix"] or model["continuing_subword_prefix"])
    )


def _strips(tokenizer: dict[str, Any]) -> bool:
    """Whether an added token asks something of the text beside it, which genai leaves out too."""
    asked = ("lstrip", "rstrip", "single_word")
    return any(token[key] for token in tokenizer["added_tokens"] for key in asked)
