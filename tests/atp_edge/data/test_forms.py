"""What a row may hold, and what is said of one that holds nothing to learn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atp_edge.data.forms import Conversation, Pair, content_of

USER = {"role": "user", "content": "May I?"}
ANSWER = {"role": "assistant", "content": "Yes."}
CALL = {"function": {"name": "w", "arguments": {"city": "Paris"}}}


def of(**row: Any) -> Any:
    return content_of(row, chat_template=True)


def talk(**row: Any) -> list[tuple[str, str]]:
    content = of(**row)
    assert isinstance(content, Conversation)
    return [(message["role"], message["content"]) for message in content.messages]


def test_text_and_pairs() -> None:
    assert of(text="a", slice="b", other=None) == "a"
    assert of(prompt="a ", completion="b", text=None) == Pair(prompt="a ", completion="b")
    assert of(prompt="", completion="b") == Pair(prompt="", completion="b")


def test_prompt_and_completion_as_messages_learn_the_completion_alone() -> None:
    content = of(prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert content.messages == [USER, ANSWER, USER, ANSWER]
    assert content.learn_from == 3


def test_content_parts_are_joined_and_nulls_left_out() -> None:
    parts = [{"type": "text", "text": "May "}, {"type": "text", "text": "I?"}]
    assert talk(messages=[{"role": "user", "content": parts, "name": None}, ANSWER])[0] == (
        "user",
        "May I?",
    )
    assert "name" not in of(messages=[USER | {"name": None}, ANSWER]).messages[0]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_tool_calls_need_no_content_and_have_arguments_as_objects(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "w", "arguments": arguments}}
    tools = [{"type": "function", "function": {"name": "w"}}]
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    answers = [USER, asked, {"role": "tool", "content": ""}, ANSWER]
    content = of(messages=answers, tools=json.dumps(tools))
    assert content.tools == tools
    assert content.messages[1]["content"] == ""
    assert content.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


@pytest.mark.parametrize("none", [[], {}, 0, "", None])
def test_no_tool_calls_are_none_whatever_stands_for_them(none: Any) -> None:
    content = of(messages=[USER, ANSWER | {"tool_calls": none}])
    assert content.messages == [USER, ANSWER]


def test_sharegpt() -> None:
    turns = [{"from": "human", "value": "May I?"}, {"from": "gpt", "value": "Yes."}]
    assert talk(conversations=turns) == [("user", "May I?"), ("assistant", "Yes.")]
    assert talk(conversations=turns, system="Be brief.")[0] == ("system", "Be brief.")
    assert talk(conversations=[USER, ANSWER]) == talk(conversations=turns)
    with pytest.raises(ValueError, match=r"conversations 0: from 'bot'; expected one of system, h"):
        of(conversations=[{"from": "bot", "value": "x"}])


def test_alpaca_through_the_chat_template_or_in_its_own_words() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert talk(**row) == [("user", "Add.\n\n1, 2"), ("assistant", "3")]
    pair = content_of(row, chat_template=False)
    assert isinstance(pair, Pair)
    assert pair.prompt.startswith("Below is an instruction that describes a task, paired with an")
    assert pair.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    alone = content_of(row | {"input": ""}, chat_template=False)
    assert isinstance(alone, Pair)
    assert "### Input" not in alone.prompt
    assert alone.prompt.startswith("Below is an instruction that describes a task. Write")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, r"text: null; expected text"),
        ({"prompt": None, "completion": "y"}, r"prompt: null"),
        ({"messages": None}, r"messages: null"),
        ({"text": 7}, r"text is a number; expected text, in quotes"),
        ({"text": True}, r"text is true or false"),
        ({"text": ["a"]}, r"text is a list"),
        ({"text": {"a": 1}}, r"text is an object"),
        ({"text": ""}, r"text is empty; give it text, or leave the row out"),
        ({"text": " \n"}, r"text is empty"),
        ({"prompt": "x", "completion": 7}, r"completion is a number"),
        ({"prompt": "x", "completion": " "}, r"completion is empty"),
        ({"prompt": [USER], "completion": "Yes."}, r"prompt is a list"),
        ({"messages": []}, r"no message of the assistant: there is no answer to learn"),
        ({"messages": [USER]}, r"no message of the assistant"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, r"no message of the assistant"),
        ({"messages": "[1"}, r"messages is text that is not JSON"),
        ({"messages": [1]}, r"messages is no list of objects"),
        ({"messages": {"role": "user"}}, r"messages is no list of objects"),
        ({"messages": [{"content": "x"}]}, r"message 0: role None; expected one of system, dev"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"message 0: role 'narrator'"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"message 0 \(user\) is null"),
        ({"messages": [USER | {"content": 7}, ANSWER]}, r"message 0 \(user\) is a number"),
        ({"messages": [USER, ANSWER | {"content": ""}]}, r"message 1 \(assistant\) is empty"),
        ({"messages": [USER, ANSWER | {"content": None}]}, r"message 1 \(assistant\) is null"),
        (
            {"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]},
            r"message 0 \(user\): a part of type 'image'; expected text parts alone",
        ),
        ({"messages": [USER | {"content": [7]}, ANSWER]}, r"a part of type 'a number'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, r"a tool call without a function"),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"name": "w", "arguments": "{"}]}]},
            r"arguments of a tool call that are not JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": 7}, r"tools is no list of objects"),
        ({"instruction": "", "output": "3"}, r"instruction is empty"),
        ({"instruction": "Add.", "output": 3}, r"output is a number"),
    ],
)
def test_what_is_nothing_to_learn_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        content_of(row, chat_template=True)


@pytest.mark.parametrize("value", [{"txt": "x"}, {}, 7, None, "text", ["text"]])
def test_other_keys_are_named_with_those_expected(value: Any) -> None:
    keys = r"\['txt'\]" if value == {"txt": "x"} else r"\[\]"
    with pytest.raises(ValueError, match=rf"found the keys {keys}; expected text, prompt and comp"):
        content_of(value, chat_template=True)
