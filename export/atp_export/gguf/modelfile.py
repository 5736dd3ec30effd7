"""Ollama's Modelfile beside a GGUF file: where the weights are, the chat template, the end tokens.

Ollama renders chats by a Go template, not by the file's own Jinja. What stands around the messages
of a plain chat is read off renderings of the Jinja template, and tried on others before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError

S, U, A = "ATPSYSTEM", "ATPUSER", "ATPREPLY"
Chat = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What stands before and after a message of each role; opening: before a chat without a system
    message; ask: before the answer."""

    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str

    def render(self, chat: Chat) -> str:
        """A chat that ends with what the user says, as Ollama would have it."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        opening = "" if chat[0]["role"] == "system" else self.opening
        parts = [f"{around[m['role']][0]}{m['content']}{around[m['role']][1]}" for m in chat]
        return opening + "".join(parts) + self.ask

    def go_template(self) -> str:
        """The same in Go's template language."""
        roles = (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        branches = " else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{'
            for role, (before, after) in roles
        )
        opening = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{self.opening}{{{{ end }}}}'
        shown = opening if self.opening else ""
        start = "{{- range $i, $_ := .Messages }}"
        return f"{start}{shown}{{{{ {branches} end }}}}{{{{ end }}}}{self.ask}"


def modelfile(tokenizer: Any, ends: Sequence[int], *, adds_bos: bool) -> str:
    """ends: ids of the end tokens. adds_bos: whether llama.cpp puts the first token itself."""
    turns = turns_of(tokenizer, adds_bos=adds_bos)
    lines = ["FROM ./model.gguf"]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    elif tokenizer.chat_template:
        lines.append("# No TEMPLATE: the chat template says more than what stands around messages.")
    stops = [tokenizer.convert_ids_to_tokens(end) for end in ends]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop]
    return "\n".join(lines) + "\n"


def turns_of(tokenizer: Any, *, adds_bos: bool) -> Turns | None:
    """None: there is no chat template, or one that these parts do not render."""
    if not tokenizer.chat_template:
        return None
    first = tokenizer.bos_token if adds_bos else None

    def rendered(*chat: tuple[str, str], ask: bool = True) -> str:
        messages = [{"role": role, "content": text} for role, text in chat]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask
        )
        return text.removeprefix(first) if first else text

    system, user, reply = ("system", S), ("user", U), ("assistant", A)
    try:
        answered = rendered(system, user, reply, ask=False)
        again = rendered(system, user, reply, user)
        turns = _parts(
            asked=rendered(system, user),
            answered=_until_the_end(answered, again, tokenizer.eos_token),
            again=again,
            plain=rendered(user),
        )
        chats = ((user,), (system, user), (user, reply, user), (system, user, reply, user),
                 (("user", "Say: why?"), ("assistant", "No."), ("user", "1 2")))  # fmt: skip
        same = turns is not None and all(
            turns.render([{"role": r, "content": t} for r, t in chat]) == rendered(*chat)
            for chat in chats
        )
    except (TemplateError, ValueError, TypeError):
        return None
    text = turns.go_template() if turns and same else '"""'
    return None if '"""' in text or _has_braces(turns) else turns


def _until_the_end(answered: str, again: str, eos: str | None) -> str:
    """A chat that ends with a reply, without the end token that is put after a whole chat alone
    (Phi-4-mini's)."""
    return answered if again.startswith(answered) or not eos else answered.removesuffix(eos)


def _parts(*, asked: str, answered: str, again: str, plain: str) -> Turns | None:
    """Turns of four renderings; None where they do not have that form."""
    if not (S in asked and U in asked and A in answered and U in plain):
        return None
    before_system, rest = asked.split(S, 1)
    after_system, after_user = rest.split(U, 1)
    to_reply = answered.split(U, 1)[1].split(A, 1)[0]
    after_reply = answered.split(A, 1)[1]
    to_user = again.split(A, 1)[1].split(U, 1)[0]
    before_user = to_user.removeprefix(after_reply)
    end_of_user = _common(after_reply, to_reply, after_user)
    opening = plain.split(U, 1)[0]
    if not (after_system.endswith(before_user) and opening.endswith(before_user)):
        return None
    return Turns(
        opening=opening[: len(opening) - len(before_user)],
        system=(before_system, after_system[: len(after_system) - len(before_user)]),
        user=(before_user, end_of_user),
        assistant=(to_reply[len(end_of_user) :], after_reply),
        ask=after_user[len(end_of_user) :],
    )


def _common(*texts: str) -> str:
    """What all of them begin with."""
    same = takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in same)


def _has_braces(turns: Turns | None) -> bool:
    """Whether a text would be read as Go's own."""
    if turns is None:
        return True
    texts = (turns.opening, *turns.system, *turns.user, *turns.assistant, turns.ask)
    return any("{{" in text for text in texts)
