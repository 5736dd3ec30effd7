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
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE = (_LLAMA3, _QWEN2, _GPT4O, _TEKKEN, _SEED)
"""Of which some part matches every character: nothing stands between two matches."""
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_GPT4O,), False): "gpt-4o",
    ((_TEKKEN,), True): "tekken",
    ((_SEED,), False): "seed-coder",
    (_DEEPSEEK3, False): "deepseek-v3",
    (("digits",), False): "smollm",
    ((), False): "gpt-2",
}
"""By what splits before the bytes (regular expressions, one after another, or digits one by one, or
nothing), and whether a word that is a token is taken whole, whatever merges say."""
_NO_PATTERN = ((), ("digits",))
"""After which GPT-2's expression splits."""


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """Of the contents of a tokenizer.json; None: another split, or no BPE."""
    *before, last = steps_of(tokenizer) or [{}]
    rules = tuple(map(_rule, before))
    model = tokenizer["model"]
    if model["type"] != "BPE" or not _makes_bytes(last, rules):
        return None
    return PRE_TOKENIZERS.get((rules, bool(model["ignore_merges"])))


def steps_of(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the pre-tokenizer."""
    parts = tokenizer["pre_tokenizer"] or {}
    steps: list[dict[str, Any]] = parts.get("pretokenizers", [parts])
    return steps


def _rule(step: dict[str, Any]) -> str:
    """A step before the bytes as in a key of the table; one that is not understood makes none."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": str(found)}, "behavior": str(behavior),
              "invert": bool(invert)}:  # fmt: skip
            pattern = found.replace("\r", r"\r").replace("\n", r"\n")
            if (behavior, invert) == ("Isolated", False) and pattern != "digits":
                return pattern
            # What lies between matches is taken out: nothing, where all is matched.
            if (behavior, invert) == ("Removed", True) and pattern in _WHOLE:
                return pattern
    return f"unknown {step.get('type')}"


def _makes_bytes(step: dict[str, Any], rules: tuple[str, ...]) -> bool:
    """Whether a step makes bytes of text, and splits by GPT-2's expression where no other rule
    split it into words."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return splits == (rules in _NO_PATTERN)
        case _:
            return False
