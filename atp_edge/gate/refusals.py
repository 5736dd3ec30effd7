"""Refusals, told by phrases in a file, before and after."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from atp_edge.data.files import text_of
from atp_edge.gate.results import Check
from atp_edge.gate.settings import RefusalLimits
from atp_edge.gate.statistics import Status, fewest_that_tell, mcnemar

BUILT_IN = Path(__file__).with_name("refusals.txt")
FEWEST_TEXTS = 10
_QUOTES = ('""', "''", "“”", "«»", "»«", "„“")
# An item of a list, what JSON, TOML and YAML write before a text, a field of CSV.
_CODE = re.compile(r"""[-*•] |[\w.]*\s*[=:]?\s*[\[{]\s*["'\[{]|"[^"]*"\s*[,;:#]""")
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ′`´", "'"))


def read_phrases(path: Path) -> list[str]:
    """Phrases, a line each, written as `refuses` reads the text. Raises ValueError for a file
    without any, and for one of JSON, TOML, YAML, CSV, a list or quotes, which no text would hold.
    """
    written = text_of(path)
    phrases = [x for x in map(_plain, written.split("\n")) if x and not x.startswith("#")]
    if not phrases:
        raise ValueError(f"{path} holds no phrase: expected one a line")
    if rows := phrases if _is_json(written) else [x for x in phrases if _is_code(x)]:
        raise ValueError(
            f"{path}: {rows[0][:40]!r} is JSON, of a list or in quotes: expected a phrase a line, "
            "bare"
        )
    if len(phrases) > 1 and all(phrase.endswith(",") for phrase in phrases[:-1]):
        raise ValueError(
            f"{path}: {phrases[0][:40]!r}: every line ends in a comma; expected a phrase a line, "
            "bare"
        )
    return phrases


def _is_json(text: str) -> bool:
    try:
        return not isinstance(json.loads(text), int | float)
    except ValueError:
        return False


def _is_code(line: str) -> bool:
    bare = line.rstrip(" ,;]")
    quoted = len(bare) > 1 and bare[0] + bare[-1] in _QUOTES and '"' not in bare[1:-1]
    return quoted or _CODE.match(line) is not None


def _by_built_in(dense: Sequence[str], slim: Sequence[str]) -> str:
    """What the built-in phrases tell of texts, if anything."""
    phrases = read_phrases(BUILT_IN)
    before, after = (sum(refuses(text, phrases) for text in texts) for texts in (dense, slim))
    return f"by the built-in phrases {before} before, {after} after" if before + after else ""


def refuses(text: str, phrases: Sequence[str]) -> bool:
    """Whether a text has one of the phrases that `read_phrases` gave."""
    plain = _plain(text)
    return any(phrase in plain for phrase in phrases)


def _plain(text: str) -> str:
    """In small letters, with one kind of apostrophe, space and accent, without signs that do not
    show (NFKC; Unicode's category Cf)."""
    shown = "".join(
        x for x in unicodedata.normalize("NFKC", text) if unicodedata.category(x) != "Cf"
    )
    return " ".join(shown.lower().translate(_APOSTROPHES).split())


def check_refusals(
    dense: Sequence[str], slim: Sequence[str], phrases: Sequence[str],
    limits: RefusalLimits, level: float,
) -> Check:  # fmt: skip
    """The share of texts that refuse, prompt by prompt; failed where it rises by more than the
    margin and not by chance, undecided where it may be chance, where of too few texts a share
    of the margin need not have shown itself, and where phrases of one's own find none and the
    built-in ones do. A rise that is no chance is required, of however few:
    a verdict does not pass over it."""
    before, after = ([refuses(text, phrases) for text in texts] for texts in (dense, slim))
    more = sum(b < a for b, a in zip(before, after, strict=True))
    fewer = sum(b > a for b, a in zip(before, after, strict=True))
    count = len(before)
    rise = (more - fewer) / max(count, 1)
    status: Status = "undecided"
    fewest = max(FEWEST_TEXTS, fewest_that_tell(limits.more, level))
    text = f"texts that refuse: {sum(before)} before, {sum(after)} after, of {count}"
    beyond = rise > limits.more
    real = beyond and mcnemar(more, fewer) < level
    if beyond:
        status = "failed" if real and count >= FEWEST_TEXTS else status
    elif count >= fewest:
        status = "passed"
    if not sum(before) + sum(after) and (told := _by_built_in(dense, slim)):
        status = "undecided"
        text += f"; {told}: are the phrases of your file as the models write them?"
    elif status == "undecided":
        text += (
            f"; not told from the margin of {limits.more:g}: {fewest} and more would tell "
            "(tasks.items, more test documents)"
        )
    return Check(
        name="refusals",
        status=status,
        text=text,
        required=real,
        dense=sum(before) / max(count, 1),
        slim=sum(after) / max(count, 1),
        difference=rise,
        limit=limits.more,
        items=count,
        clusters=count,
    )
