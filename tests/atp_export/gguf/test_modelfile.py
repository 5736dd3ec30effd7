"""Ollama's Modelfile: what stands around a chat's messages, read off its Jinja template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from atp_export.gguf.modelfile import modelfile, turns_of
from transformers import AutoTokenizer

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PHI4_MINI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
THINKS = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:3] }}")


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


def test_the_demo_s_template_with_its_default_system_message(tokenizer: Any) -> None:
    text = modelfile(tokenizer, [2], adds_bos=False)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- range $i, $_ := .Messages }}')
    opening = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    assert '{{ if and (eq $i 0) (ne .Role "system") }}' + opening in text
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n' in text
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')


def test_what_the_runtime_puts_first_is_not_there_twice(tokenizer: Any) -> None:
    tokenizer.chat_template, tokenizer.bos_token = PLAIN, "<|im_start|>"
    chat = [{"role": "user", "content": "a"}]
    for adds_bos, first in ((True, ""), (False, "<|im_start|>")):
        turns = turns_of(tokenizer, adds_bos=adds_bos)
        assert turns is not None
        assert turns.render(chat) == f"{first}<user>a</s><assistant>"


def test_an_end_token_after_a_whole_chat_is_no_part_of_a_reply(tokenizer: Any) -> None:
    tokenizer.chat_template, tokenizer.eos_token = PHI4_MINI, "<|endoftext|>"
    turns = turns_of(tokenizer, adds_bos=False)
    assert turns is not None
    assert turns.assistant == ("<|assistant|>", "<|end|>")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}]  # fmt: skip
    rendered = "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert turns.render(chat) == rendered


@pytest.mark.parametrize("template", [LLAMA2, THINKS, PLAIN.replace("<{{", "{{ '{{' }}<{{")])
def test_a_template_of_another_form_is_left_out_and_said(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert turns_of(tokenizer, adds_bos=False) is None
    assert "# No TEMPLATE: the chat template says more" in modelfile(tokenizer, [], adds_bos=False)


def test_a_model_without_a_template_is_continued(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert modelfile(tokenizer, [], adds_bos=False) == "FROM ./model.gguf\n"
