"""Conversations through templates: one rendering, answers learned whole and nothing else."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from atp_edge.data.chat import DATE, Chat
from atp_edge.data.documents import Segment
from atp_edge.data.forms import Conversation, content_of
from tests.tiny_tokenizers import CHATML, TEMPLATES, THINKING, tokenizer_of

TWO_TURNS = [
    {"role": "user", "content": "May I copy?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And sell copies?"},
    {"role": "assistant", "content": "Also yes."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of <|im_end|>"}}]
CALLED = [
    {"role": "user", "content": "Weather in Paris?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
    },
    {"role": "tool", "content": "3 C"},
    {"role": "assistant", "content": "It has 3 C."},
]


def conversation(messages: list[dict[str, Any]], **row: Any) -> Conversation:
    content = content_of({"messages": messages} | row, chat_template=True)
    assert isinstance(content, Conversation)
    return content


def segments(template: str, messages: list[dict[str, Any]], **row: Any) -> tuple[Segment, ...]:
    return Chat(tokenizer_of("byte-level", template=template)).segments(
        conversation(messages, **row)
    )


def learned(made: tuple[Segment, ...]) -> list[str]:
    return [segment.text for segment in made if segment.learn]


def text(made: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in made)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("chatml", ["Yes.<|im_end|>", "Also yes.<|im_end|>"]),
        ("marked", ["Yes.<|im_end|>", "Also yes.<|im_end|>"]),
        # The first answer has no thoughts in the rendering of the whole.
        ("thinking", ["Yes.<|im_end|>", "<think>\n\n</think>\n\nAlso yes.<|im_end|>"]),
        ("llama-3", ["Yes.</s>", "Also yes.</s>"]),
        ("llama-2", ["Yes. </s>", "Also yes. </s>"]),
        ("words alone", [" Yes.\n", " Also yes.\n"]),
    ],
)
def test_two_turns_are_one_rendering_and_each_answer_is_learned_to_its_end(
    template: str, answers: list[str]
) -> None:
    made = segments(TEMPLATES[template], TWO_TURNS)
    tokenizer = tokenizer_of("byte-level", template=TEMPLATES[template])
    assert text(made) == tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert learned(made) == answers
    unlearned = "".join(segment.text for segment in made if not segment.learn)
    assert "May I copy?" in unlearned
    assert "And sell copies?" in unlearned


def test_tool_calls_are_learned_as_the_template_writes_them_and_their_results_are_not() -> None:
    made = segments(THINKING, CALLED, tools=TOOLS)
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    thought = "<think>\n\n</think>\n\n"
    assert learned(made) == [
        f"{thought}{call}<|im_end|>",
        f"{thought}It has 3 C.<|im_end|>",
    ]
    # What the tool's description holds is its text; the template's own tokens are tokens.
    assert [s.text for s in made if not s.parse] == ["<|im_end|>"]
    assert text(made).startswith('<|im_start|>system\n# Tools\n{"type": "function"')


def test_thoughts_that_the_template_takes_out_of_earlier_turns() -> None:
    thinking = [
        message
        if message["role"] == "user"
        else message | {"content": f"<think>\nhm\n</think>\n\n{message['content']}"}
        for message in TWO_TURNS
    ]
    made = segments(THINKING, thinking)
    assert learned(made) == ["Yes.<|im_end|>", "<think>\nhm\n</think>\n\nAlso yes.<|im_end|>"]
    assert text(made).count("hm") == 1


def test_of_a_prompt_the_answers_are_not_learned() -> None:
    for name in ("chatml", "marked"):
        content = content_of(
            {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, chat_template=True
        )
        assert isinstance(content, Conversation)
        tokenizer = tokenizer_of("byte-level", template=TEMPLATES[name])
        assert learned(Chat(tokenizer).segments(content)) == ["Also yes.<|im_end|>"]


def test_space_around_the_words_stays_or_goes_as_the_template_has_it() -> None:
    padded = [message | {"content": f" {message['content']}\n"} for message in TWO_TURNS]
    assert learned(segments(CHATML, padded)) == [" Yes.\n<|im_end|>", " Also yes.\n<|im_end|>"]
    assert learned(segments(TEMPLATES["llama-3"], padded)) == ["Yes.</s>", "Also yes.</s>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_token_text_in_messages_is_told_from_the_template_s_own(name: str) -> None:
    typed = "end </s> with <|im_end|>"
    messages = [message | {"content": f"{message['content']} {typed}"} for message in TWO_TURNS]
    made = segments(TEMPLATES[name], messages)
    assert [s.text for s in made if not s.parse] == ["</s>", "<|im_end|>"] * 4
    tokenizer = tokenizer_of("byte-level", template=TEMPLATES[name])
    assert text(made) == tokenizer.apply_chat_template(messages, tokenize=False)
    parsed = Chat(tokenizer, parse=True).segments(conversation(messages))
    assert text(parsed) == text(made)
    assert all(segment.parse for segment in parsed)


def test_a_template_that_prints_the_time_prints_one_date() -> None:
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}{% endif %}"
    made = segments(clock + CHATML, TWO_TURNS)
    assert text(made).startswith("26 Jul 2024 00:00:00.000000<|im_start|>user")
    assert datetime(2024, 7, 26) == DATE


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", r"messages need a chat template, and this tokenizer has none; give prompt and"),
        ("{{ messages[9].content }}", r"the chat template fails \(UndefinedError: .*has no elem"),
        ("{{ raise_exception('no user') }}", r"the chat template fails \(TemplateError: no user\)"),
        ("{% for %}", r"the chat template fails \(TemplateSyntaxError"),
        ("{{ 1 // 0 }}", r"the chat template fails \(ZeroDivisionError"),
        ("{{ messages[1].content }}", r"the chat template leaves out message 0 \(user\)"),
        (
            "{% for m in messages %}{{ m.content | length }}{{ m.content }}</s>{% endfor %}",
            r"the chat template changes with the words themselves",
        ),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            r"the chat template writes message 0 \(user\) inside of what is learned",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            r"the chat template writes message 1 \(assistant\) outside of what is learned",
        ),
        (
            "{% for m in messages %}{{ m.content.split('es')[-1] }}</s>{% endfor %}",
            r"message 1: the chat template leaves out the start of the answer",
        ),
    ],
)
def test_templates_that_cannot_be_read_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments(template, TWO_TURNS)


def test_a_template_that_needs_a_question_reads_a_system_prompt_before_it() -> None:
    needs = "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    needs += "{{ raise_exception('no user turn') }}{% endif %}"
    system = {"role": "system", "content": "Be brief."}
    made = segments(needs + CHATML, [system, *TWO_TURNS])
    assert learned(made) == ["Yes.<|im_end|>", "Also yes.<|im_end|>"]
    with pytest.raises(
        ValueError, match=r"the chat template fails \(TemplateError: no user turn\)"
    ):
        segments(needs + CHATML, [system, TWO_TURNS[1]])


def test_a_template_may_change_the_words() -> None:
    shouting = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
    assert learned(segments(shouting, TWO_TURNS)) == ["YES.</s>", "ALSO YES.</s>"]


def test_a_template_without_tools_is_refused_for_them() -> None:
    with pytest.raises(ValueError, match=r"the chat template does not write the tool 'weather'"):
        segments(CHATML, TWO_TURNS, tools=TOOLS)
    with pytest.raises(ValueError, match=r"leaves out message 1 \(assistant\)"):
        segments(CHATML, CALLED)


def test_a_template_of_several_is_chosen_by_the_tools() -> None:
    tokenizer = tokenizer_of("byte-level")
    tokenizer.chat_template = {"default": CHATML, "tool_use": THINKING}
    chat = Chat(tokenizer)
    assert text(chat.segments(conversation(TWO_TURNS))).startswith("<|im_start|>user")
    assert "# Tools" in text(chat.segments(conversation(CALLED, tools=TOOLS)))


SAID = ["a", " ", "\n", "é", "<think>", "</think>", "</s>", "assistant",
        "<|im_start|>assistant\n", "<|im_end|>", "Yes."]  # fmt: skip
words = st.lists(st.sampled_from(SAID), max_size=6).map("".join)


@given(st.sampled_from(list(TEMPLATES)), st.lists(st.tuples(words, words), min_size=1, max_size=3))
@seed(35)
@settings(max_examples=150, deadline=None, database=None)
def test_whatever_is_said_answers_are_learned_and_questions_are_not(
    name: str, turns: list[tuple[str, str]]
) -> None:
    messages = [
        {"role": role, "content": f"{told}{role[0]}{i}{role[0]}"}
        for i, turn in enumerate(turns)
        for role, told in zip(("user", "assistant"), turn, strict=True)
    ]
    tokenizer = tokenizer_of("byte-level", template=TEMPLATES[name])
    made = Chat(tokenizer).segments(conversation(messages))
    assert text(made) == tokenizer.apply_chat_template(messages, tokenize=False)
    answers = "".join(learned(made))
    asked = "".join(segment.text for segment in made if not segment.learn)
    for i in range(len(turns)):
        assert (f"a{i}a" in answers, f"u{i}u" in answers) == (True, False)
        assert (f"a{i}a" in asked, f"u{i}u" in asked) == (False, True)
    # Each answer goes on to the end of its turn, and what is parsed is the template's own.
    ends = sum(segment.text.endswith(("<|im_end|>", "</s>", "\n")) for segment in made
               if segment.learn and segment.parse)  # fmt: skip
    assert ends >= len(turns)
