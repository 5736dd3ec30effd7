"""Prompts that must pass, or must never: asked of the very files that ship."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_edge.data.chat import chat_ids
from atp_edge.data.encoding import prompt_ids
from atp_edge.gate.results import Check
from atp_edge.gate.rows import known_rows
from atp_edge.gate.statistics import Status

Answer = tuple[str, bool]
"""A text, and whether it was ended: else it was cut, and there may be more of it."""
Ask = Callable[[Sequence[str], bool], list[Answer]]
"""Answers to prompts; True: they are messages of a user, through the chat template."""

_TEXTS = ("contains", "not_contains", "regex")
_KNOWN = {"prompt", "expect", "chat", "max_length", "name", *_TEXTS}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A prompt and what must hold of its answer: all of it (pass), or not all of it (never).

    max_length: characters of the answer at most.
    """

    place: str
    prompt: str
    never: bool = False
    chat: bool = False
    contains: tuple[str, ...] = ()
    not_contains: tuple[str, ...] = ()
    regex: tuple[str, ...] = ()
    max_length: int | None = None

    def broken(self, answer: str) -> list[str]:
        """What does not hold of an answer."""
        found = [f"lacks {x!r}" for x in self.contains if x not in answer]
        found += [f"holds {x!r}" for x in self.not_contains if x in answer]
        found += [f"does not match {x!r}" for x in self.regex if not re.search(x, answer)]
        if self.max_length is not None and len(answer) > self.max_length:
            found.append(f"has {len(answer)} characters, {self.max_length} at most")
        return found


def asked_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Ids of a prompt as it is asked. chat: as `Ask`."""
    return (chat_ids if chat else prompt_ids)(tokenizer, prompt)


def read_rules(path: Path) -> list[Rule]:
    """Rules of a JSONL file. Raises ValueError naming file and line."""
    return [_rule(place, row) for place, row in known_rows(path, known=_KNOWN)]


def told_by_name(rules: Iterable[Rule]) -> list[Rule]:
    """All rules. Raises ValueError where two share a name, for a check is known by it."""
    named: dict[str, Rule] = {}
    for rule in rules:
        if rule.place in named:
            raise ValueError(
                f"prompts.files: two rules are named {rule.place!r}: give each a name of its own, "
                "or none"
            )
        named[rule.place] = rule
    return list(named.values())


def _rule(place: str, row: dict[str, Any]) -> Rule:
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise ValueError(f"{place}: prompt: expected a text")
    expect, length, chat = row.get("expect", "pass"), row.get("max_length"), row.get("chat", False)
    if expect not in ("pass", "never"):
        raise ValueError(f"{place}: expect = {expect!r}: expected pass or never")
    if not isinstance(chat, bool):
        raise ValueError(f"{place}: chat = {chat!r}: expected true or false")
    if length is not None and (type(length) is not int or length < 0):
        raise ValueError(f"{place}: max_length = {length!r}: expected a number, 0 or more")
    texts = {key: _texts(place, key, row.get(key, ())) for key in _TEXTS}
    if not any(texts.values()) and length is None:
        raise ValueError(f"{place}: no rule; give one of {', '.join(_TEXTS)}, max_length")
    for pattern in texts["regex"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{place}: regex {pattern!r}: {error}") from None
    named = row.get("name", place)
    if not isinstance(named, str) or not named.strip():
        raise ValueError(f"{place}: name = {named!r}: expected a text")
    return Rule(
        place=named, prompt=row["prompt"], never=expect == "never", chat=chat, max_length=length,
        **texts,
    )  # fmt: skip


def _texts(place: str, key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(x, str) and x for x in listed):
        raise ValueError(f"{place}: {key} = {value!r}: expected a text or a list of texts")
    return tuple(listed)


def check_prompts(rules: Sequence[Rule], ask: Ask) -> tuple[list[Check], list[str]]:
    """A check a rule, and all answers."""
    answers: dict[int, Answer] = {}
    for chat in (False, True):
        places = [i for i, rule in enumerate(rules) if rule.chat == chat]
        said = ask([rules[i].prompt for i in places], chat) if places else []
        answers |= dict(zip(places, said, strict=True))
    checks = [_check(rule, *answers[i]) for i, rule in enumerate(rules)]
    return checks, [answers[i][0] for i in range(len(rules))]


def answered(tokenizer: Any, made: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
    """What was generated as answers. made: new tokens, which stop before one that ends a text."""
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [(text, len(ids) < new_tokens) for text, ids in zip(texts, made, strict=True)]


def _check(rule: Rule, answer: str, ended: bool) -> Check:
    broken = rule.broken(answer)
    failed = not broken if rule.never else bool(broken)
    shown = " ".join(answer.split())[:80]
    status: Status = "failed" if failed else "passed"
    if not broken and rule.max_length is not None and not ended:
        status = "undecided"
        why = (
            f"was cut at {len(answer)} characters, and may pass {rule.max_length}: more "
            "prompts.new_tokens would tell"
        )
    elif rule.never:
        why = "holds all that must never be" if failed else "as it should be"
    else:
        why = "; ".join(broken) or "as it should be"
    return Check(
        name="prompt",
        status=status,
        text=f"prompt {rule.place}: the answer {shown!r} {why}",
        slice=rule.place,
        items=1,
        clusters=1,
    )
