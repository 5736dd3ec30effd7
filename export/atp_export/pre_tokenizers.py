"""How a byte-level BPE tokenizer splits text before the bytes, by the names that llama.cpp has."""

from __future__ import annotations

from typing import Any

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_ENDING, "").replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    (_GPT4O, False): "gpt-4o",
    (_TEKKEN, True): "tekken",
    ("digits", False): "smollm",
    ("", False): "gpt-2",
}
"""By what splits before the bytes (a regular expression, or digits one by one, or nothing), and
whether a word that is a token is taken whole, whatever merges say."""
_NO_PATTERN = ("", "digits")
"""After which GPT-2's expression splits."""


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """Of the contents of a tokenizer.json; None: another split, or no BPE."""
    *before, last = steps_of(tokenizer) or [{}]
    rule = "".join(map(_rule, before[:1]))
    model = tokenizer["model"]
    if model["type"] != "BPE" or len(before) > 1 or not _makes_bytes(last, rule):
        return None
    return PRE_TOKENIZERS.get((rule, bool(model["ignore_merges"])))


def steps_of(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the pre-tokenizer."""
    parts = tokenizer["pre_tokenizer"] or {}
    steps: list[dict[str, Any]] = parts.get("pretokenizers", [parts])
    return steps


def _rule(step: dict[str, Any]) -> str:
    """A step before the bytes as a key of the table; one that is not understood makes none."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
              "invert": False} if pattern not in _NO_PATTERN:  # fmt: skip
            return pattern
        case _:
            return f"unknown {step.get('type')}"


def _makes_bytes(step: dict[str, Any], rule: str) -> bool:
    """Whether a step makes bytes of text, and splits by GPT-2's expression where no other rule
    split it into words."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return splits == (rule in _NO_PATTERN)
        case _:
            return False
