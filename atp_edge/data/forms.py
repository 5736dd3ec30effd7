"""The forms that a row may have: text, a prompt and its completion, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# The prompt of Stanford Alpaca, for tokenizers without a chat template.
_ALPACA = "Below is an instruction that describes a task{paired}. Write a response that "
_ALPACA += "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}"
_ALPACA += "### Response:\n"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages {role, content, ...}, the tools they may call, and from which one on answers are
    learned."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    learn_from: int = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt, and what is learned after it."""

    prompt: str
    completion: str


Content = str | Pair | Conversation
Object = dict[str, Any]


def content_of(value: Any, *, chat_template: bool) -> Content:
    """What a row holds. Raises ValueError: what is wrong with it and what to do."""
    row = value if isinstance(value, dict) else {}
    there = {key for key, inner in row.items() if inner is not None}
    for keys, read in _FORMS.items():
        if there.issuperset(keys):
            return read(row, chat_template)
    null = sorted(key for keys in _FORMS for key in keys if key in row.keys() - there)
    if null:
        raise ValueError(f"{' and '.join(null)}: null; expected text, or leave the row out")
    raise ValueError(
        f"found the keys {sorted(map(str, row))}; expected text, prompt and completion, messages, "
        "conversations (ShareGPT), or instruction and output (Alpaca)"
    )


def text_in(value: Any, name: str, *, empty: bool = False) -> str:
    """A value that is text. Raises ValueError naming what it is instead."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}; expected text, in quotes")
    if not (empty or value.strip()):
        raise ValueError(f"{name} is empty; give it text, or leave the row out")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)


def _listed(row: Object, key: str) -> list[Any]:
    """A list of objects, which tables may hold as JSON text."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{key} is text that is not JSON; expected a list") from None
    if not isinstance(value, list) or not all(isinstance(inner, dict) for inner in value):
        raise ValueError(f"{key} is no list of objects; expected one object a message")
    return value


# Prompts


def _of_prompt(row: Object, _: bool) -> Content:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _listed(row, "prompt")
        return _conversation(asked + _listed(row, "completion"), row, learn_from=len(asked))
    return Pair(
        prompt=text_in(prompt, "prompt", empty=True), completion=text_in(completion, "completion")
    )


def _of_alpaca(row: Object, chat_template: bool) -> Content:
    """By the chat template where there is one, else in Alpaca's own words."""
    instruction = text_in(row["instruction"], "instruction")
    output = text_in(row["output"], "output")
    given = text_in(row.get("input") or "", "input", empty=True).strip()
    if chat_template:
        asked = f"{instruction}\n\n{given}" if given else instruction
        turns = [("user", asked), ("assistant", output)]
        return Conversation(messages=[{"role": r, "content": c} for r, c in turns])
    paired = ", paired with an input that provides further context" if given else ""
    shown = f"### Input:\n{given}\n\n" if given else ""
    prompt = _ALPACA.format(paired=paired, instruction=instruction, input=shown)
    return Pair(prompt=prompt, completion=output)


# Conversations


def _of_messages(row: Object, _: bool) -> Content:
    return _conversation(_listed(row, "messages"), row)


def _of_sharegpt(row: Object, _: bool) -> Content:
    """{from, value} as messages; those that have a role already stay."""
    messages = []
    for number, turn in enumerate(_listed(row, "conversations")):
        if "role" in turn:
            messages.append(turn)
            continue
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(
                f"conversations {number}: from {turn.get('from')!r}; expected one of "
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append({"role": role, "content": turn.get("value")})
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _conversation(messages, row)


def _conversation(turns: list[Any], row: Object, learn_from: int = 0) -> Conversation:
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    if not any(message["role"] == "assistant" for message in messages[learn_from:]):
        raise ValueError("no message of the assistant: there is no answer to learn; add one")
    tools = _listed(row, "tools") if row.get("tools") else None
    return Conversation(messages=messages, tools=tools, learn_from=learn_from)


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """A message as chat templates read it: nulls left out, content one text.

    Text parts are joined as they are; the arguments of a tool call are objects, for templates write
    them as JSON (OpenAI's files have them as JSON text).
    """
    role = turn.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number}: role {role!r}; expected one of {', '.join(ROLES)}")
    name = f"message {number} ({role})"
    message = {key: inner for key, inner in turn.items() if inner is not None}
    content = message.get("content")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, name)
    silent = role in ("system", "developer", "tool", "function") or bool(calls)
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    elif content is None and calls:
        content = ""
    message["content"] = text_in(content, name, empty=silent)
    return message


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        given = part.get("type") if isinstance(part, dict) else _kind(part)
        raise ValueError(f"{name}: a part of type {given!r}; expected text parts alone")
    return text_in(part.get("text"), f"{name}, a part", empty=True)


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name}: a tool call without a function name; expected function.name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ValueError(f"{name}: arguments of a tool call that are not JSON") from None
        function = function | {"arguments": arguments}
        made.append(call | {"function": function} if "function" in call else function)
    return made


_FORMS: dict[tuple[str, ...], Callable[[Object, bool], Content]] = {
    ("messages",): _of_messages,
    ("conversations",): _of_sharegpt,
    ("prompt", "completion"): _of_prompt,
    ("instruction", "output"): _of_alpaca,
    ("text",): lambda row, _: text_in(row["text"], "text"),
}
"""Forms by the keys that tell them, in the order in which they are looked for."""
