"""A SentencePiece BPE tokenizer, as conversions to tokenizer.json have it, as llama.cpp reads it.

tokenizer.json merges pairs by their rank; llama.cpp's SPM merges whatever two neighbours make a
piece, the piece of the best score first. Both are the same where every piece has every split of it
among the merges, and pieces follow one another by rank; that is checked, not believed
(llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm_session).
"""

from __future__ import annotations

from typing import Any

SPACE = "▁"
ESCAPED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREFIX = {"type": "Prepend", "prepend": SPACE}
AT_SPACES = {"type": "Split", "pattern": {"String": " "}}
"""A step that finds nothing: the normalizer left no space."""
NOT_MERGED = -1e9
"""The score of what no merge makes."""


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether bytes stand for what has no piece."""
    return tokenizer["model"]["type"] == "BPE" and bool(tokenizer["model"]["byte_fallback"])


def check_pieces(tokenizer: dict[str, Any]) -> None:
    """Raise ValueError for one that llama.cpp's SPM does not follow."""
    model = tokenizer["model"]
    space_prefix(tokenizer)
    if model["ignore_merges"]:
        raise ValueError("it takes a text that is a piece whole, whatever merges say")
    lacking = [f"<0x{i:02X}>" for i in range(256) if f"<0x{i:02X}>" not in model["vocab"]]
    if lacking:
        raise ValueError(f"it has no piece for {len(lacking)} bytes (the first: {lacking[0]})")
    if others := changed(tokenizer):
        raise ValueError(
            f"{others[0]!r} is looked for in text whose spaces are '{SPACE}' already (it is "
            "normalized), which llama.cpp does not"
        )
    scores(tokenizer)


def space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before every stretch of text. Raises ValueError for other steps."""
    normalizer = tokenizer["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    before = tokenizer["pre_tokenizer"]
    plain = before is None or {k: before.get(k) for k in AT_SPACES} == AT_SPACES
    if plain and steps in ([ESCAPED], [PREFIX, ESCAPED]):
        return steps[0] == PREFIX
    named = [step.get("type") for step in (*steps, before or {}) if step]
    raise ValueError(
        f"its normalizer and pre-tokenizer ({', '.join(map(str, named))}) are none that llama.cpp "
        "is known to follow; known are a space before every text or before none"
    )


def changed(tokenizer: dict[str, Any]) -> list[str]:
    """Added tokens that are looked for in normalized text, where they are written otherwise."""
    prefixed = PREFIX["type"] in str(tokenizer["normalizer"])
    return [
        token["content"]
        for token in tokenizer["added_tokens"]
        if token["normalized"] and (prefixed or {" ", SPACE} & set(token["content"]))
    ]


def scores(tokenizer: dict[str, Any]) -> dict[str, float]:
    """Of every piece that merges make. Raises ValueError where scores cannot say what merges do."""
    model = tokenizer["model"]
    pairs = [tuple(merge) for merge in model["merges"]]
    ranks: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), []).append(i)
    runs = _runs(pairs)
    for piece, own in ranks.items():
        if own[-1] - own[0] + 1 != len(own) and piece not in runs:
            raise ValueError(f"the merges that make {piece!r} do not follow one another")
    known, added = set(pairs), {token["content"] for token in tokenizer["added_tokens"]}
    for piece in model["vocab"].keys() - (added - ranks.keys()):
        for i in range(1, len(piece)):
            pair = (piece[:i], piece[i:])
            # Single characters are neighbours whether they are pieces or not.
            if pair not in known and all(len(part) == 1 or part in ranks for part in pair):
                raise ValueError(f"{pair[0]!r} and {pair[1]!r} are pieces but make no {piece!r}")
    return {piece: -float(own[0]) for piece, own in ranks.items()}


def _runs(pairs: list[tuple[str, ...]]) -> set[str]:
    """Runs of one sign (Gemma's new lines, spaces, tabs) whose merges may stand mixed.

    Where a sign's merges are all splits of all lengths, come before every merge of it with others,
    and end with that of two single signs, a run grows by one sign at a time until it is the longest
    piece, by ranks as by scores.
    """
    of_sign: dict[str, list[tuple[str, ...]]] = {}
    mixed: set[str] = set()
    for pair in pairs:
        signs = set("".join(pair))
        if len(signs) > 1:
            mixed |= signs
        elif not signs <= mixed:
            of_sign.setdefault(pair[0][0], []).append(pair)
    found: set[str] = set()
    for sign, own in of_sign.items():
        longest = max(len("".join(pair)) for pair in own)
        whole = {(sign * i, sign * (n - i)) for n in range(2, longest + 1) for i in range(1, n)}
        if set(own) == whole and own[-1] == (sign, sign):
            found |= {"".join(pair) for pair in own}
    return found
