"""A conversation through its tokenizer's chat template: one rendering, and what is learned of it.

The strings of a row carry marks through the template, noncharacters of Unicode that stand in no
text: around every message's words, so that they are found again wherever the template writes them,
and in place of special-token text, so that only the template's own is parsed. Without its marks the
rendering must equal the one of the row as it is. What is learned are the {% generation %} blocks of
the template, or, where it has none, every turn of the assistant from the generation prompt to the
end of turn. Templates may render earlier turns otherwise than the last (Qwen3's do), so no prefix
of the conversation stands for a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any

from atp_edge.data.documents import Segment
from atp_edge.data.encoding import Encoder, matching, special_texts
from atp_edge.data.forms import Conversation

# A template that prints the date prints this one, so that every day's rendering is the same: the
# date that Llama 3's templates fall back on.
DATE = datetime(2024, 7, 26)
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE, _SPECIAL, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_WORDS = re.compile(f"[{_OPEN}{_CLOSE}](\\d+){_END}")
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_SPECIAL}](\\d+){_END}")
Span = tuple[int, int]


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what a user says, through the chat template, up to where the answer begins; as in
    training, special-token text in it is text. Raises ValueError as `Chat.asked` does."""
    segments = Chat(tokenizer).asked([{"role": "user", "content": text}])
    return Encoder(tokenizer).rendered(segments)


@dataclass(frozen=True)
class Chat:
    """Renders conversations. parse: special-token text in them means the tokens."""

    tokenizer: Any
    parse: bool = False

    @cached_property
    def _special(self) -> list[str]:
        return special_texts(self.tokenizer)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        return matching(self._special)

    def segments(self, conversation: Conversation) -> tuple[Segment, ...]:
        """What the template writes, cut where learning or parsing changes.

        Raises ValueError for a template that fails or leaves something out, and where what is
        learned cannot be told.
        """
        messages, tools = self._marked(conversation)
        rendered, blocks = self._render(messages, tools)
        found = _places(rendered)
        _check_all_there(found, messages, conversation.tools, rendered)
        if _GENERATION.search(self._template(tools)):
            spans = blocks
        else:
            spans = [
                self._turn(i, messages, tools, rendered, found)
                for i, message in enumerate(messages)
                if message["role"] == "assistant" and i >= conversation.learn_from
            ]
        first = max((found[i][1] for i in found if i < conversation.learn_from), default=0)
        spans = [span for span in spans if span[0] >= first and span[0] < span[1]]
        _check_spans(spans, found, messages, conversation.learn_from)
        plain, _ = self._render(conversation.messages, conversation.tools)
        return self._checked(self._cut(rendered, spans), plain)

    def _checked(self, made: tuple[Segment, ...], plain: str) -> tuple[Segment, ...]:
        """Segments, when they are the rendering without marks."""
        if "".join(segment.text for segment in made) != plain:
            raise ValueError(
                "the chat template changes with the words themselves, so its turns cannot be told "
                "apart; mark the assistant's turns in it with {% generation %}, or give prompt and "
                "completion as text"
            )
        return made

    def asked(self, messages: list[dict[str, Any]]) -> tuple[Segment, ...]:
        """What the template writes of messages that are to be answered, up to where the answer
        begins. Raises ValueError for a template that fails or changes with the words."""
        marked, _ = self._marked(Conversation(messages=messages))
        rendered, _ = self._render(marked, None, prompt=True)
        plain, _ = self._render(messages, None, prompt=True)
        return self._checked(self._cut(rendered, []), plain)

    # Marks

    def _marked(self, conversation: Conversation) -> tuple[list[dict[str, Any]], Any]:
        def replaced(text: str) -> str:
            if self.parse:
                return text
            return self._special_text.sub(
                lambda found: f"{_SPECIAL}{self._special.index(found[0])}{_END}", text
            )

        messages = [_everywhere(message, replaced) for message in conversation.messages]
        for i, message in enumerate(messages):
            message["content"] = _wrapped(message["content"], i)
            for call in message.get("tool_calls", []):
                function = call.get("function", call)
                function["name"] = _wrapped(function["name"], i)
        return messages, _everywhere(conversation.tools, replaced)

    def _cut(self, rendered: str, spans: list[Span]) -> tuple[Segment, ...]:
        """The rendering without marks, as segments."""
        made: list[Segment] = []

        def add(text: str, learn: bool, parse: bool) -> None:
            if made and (made[-1].learn, made[-1].parse) == (learn, parse):
                made[-1] = Segment(made[-1].text + text, learn, parse)
            elif text:
                made.append(Segment(text, learn, parse))

        edges = [0, *(edge for span in spans for edge in span), len(rendered)]
        for i, (start, end) in enumerate(pairwise(edges)):
            learn = i % 2 == 1
            for mark in _MARKS.finditer(rendered, start, end):
                add(rendered[start : mark.start()], learn, True)
                if mark[0][0] == _SPECIAL:
                    add(self._special[int(mark[1])], learn, False)
                start = mark.end()
            add(rendered[start:end], learn, True)
        return tuple(made)

    # The template

    def _template(self, tools: Any) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "messages need a chat template, and this tokenizer has none; "
                "give prompt and completion instead"
            )
        template: str = self.tokenizer.get_chat_template(tools=tools)
        return _CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), template)

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what its {% generation %} blocks wrote."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._template(tools)
        try:
            (text,), blocks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=bool(_GENERATION.search(template)),
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # Whatever a template raises.
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the chat template fails ({said}); give the messages it expects, or prompt and "
                "completion"
            ) from None
        return text, blocks[0] if blocks else []

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes before the model's turn; empty where that cannot be told."""
        asked = [{"role": "user", "content": "x"}]
        try:
            without, _ = self._render(asked, None)
            with_prompt, _ = self._render(asked, None, prompt=True)
        except ValueError:
            return ""
        return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

    # Turns of templates without {% generation %}

    def _turn(
        self, i: int, messages: list[Any], tools: Any, rendered: str, found: dict[int, Span]
    ) -> Span:
        """What the model writes of message i: from the generation prompt to the end of turn."""
        first, last = found[i]
        before = max((end for _, end in found.values() if end <= first), default=0)
        prompt = self._generation_prompt
        at = rendered.rfind(prompt, before, first) if prompt else -1
        start = at + len(prompt) if at >= 0 else first
        if rendered[first] != _OPEN and at < 0:
            raise ValueError(
                f"message {i}: the chat template leaves out the start of the answer, and where "
                "the turn begins cannot be told; mark it with {% generation %} in the template"
            )
        follows = rendered[last:]
        ending = follows
        if i + 1 < len(messages):
            alone, _ = self._render(messages[: i + 1], tools)
            ending = alone[_places(alone)[i][1] :] if i in _places(alone) else ""
        return start, last + self._end_of_turn(ending, follows)

    def _end_of_turn(self, ending: str, follows: str) -> int:
        """Length of what the template writes after a turn, whether the conversation goes on or
        not, up to its last special token where it has one."""
        both = zip(ending, follows, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        tokens = [m.end() for m in self._special_text.finditer(ending) if m.end() <= shared]
        if tokens:
            return tokens[-1]
        return shared if shared == len(ending) else 0


def _everywhere(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every string changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _everywhere(inner, change) for key, inner in value.items()}
    return [_everywhere(inner, change) for inner in value] if isinstance(value, list) else value


def _wrapped(text: str, i: int) -> str:
    """Marks around the words, inside the space around them, which templates trim."""
    words = text.strip()
    if not words:
        return text
    start = text.index(words)
    marked = f"{_OPEN}{i}{_END}{words}{_CLOSE}{i}{_END}"
    return text[:start] + marked + text[start + len(words) :]


def _places(rendered: str) -> dict[int, Span]:
    """Of every message that the rendering holds, where its words begin and end, marks included."""
    found: dict[int, Span] = {}
    for mark in _WORDS.finditer(rendered):
        start, _ = found.get(int(mark[1]), mark.span())
        found[int(mark[1])] = (start, mark.end())
    return found


def _check_all_there(
    found: dict[int, Span], messages: list[dict[str, Any]], tools: Any, rendered: str
) -> None:
    for i, message in enumerate(messages):
        said = message["content"].strip() or message.get("tool_calls")
        if said and i not in found:
            raise ValueError(
                f"the chat template leaves out message {i} ({message['role']}); give the row in "
                "the form that the template writes"
            )
    for tool in tools or []:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in rendered:
            raise ValueError(
                f"the chat template does not write the tool {name!r}; take a model whose template "
                "does, or leave `tools` out"
            )


def _check_spans(
    spans: list[Span], found: dict[int, Span], messages: list[dict[str, Any]], learn_from: int
) -> None:
    """Every answer lies in one learned span, nothing else does, and spans follow each other."""
    for i, (start, end) in found.items():
        inside = any(a <= start and end <= b for a, b in spans)
        touched = any(a < end and start < b for a, b in spans)
        answer = messages[i]["role"] == "assistant" and i >= learn_from
        if (answer and not inside) or (not answer and touched):
            state = "outside of what is learned" if answer else "inside of what is learned"
            raise ValueError(
                f"the chat template writes message {i} ({messages[i]['role']}) {state}; mark the "
                "assistant's turns alone in it with {% generation %}"
            )
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise ValueError("the chat template writes two answers into each other")
