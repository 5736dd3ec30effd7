"""Small tokenizers of every kind that models have, and chat templates of every kind."""

from __future__ import annotations

import json
import random
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from atp_export.pre_tokenizers import PRE_TOKENIZERS
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

CORPUS = [
    "You may copy and sell copies of the software, and you may not. May I copy? Yes, you may.",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of the system.",
    "user assistant system tool: the weather in Paris is 3 C; call the function with arguments.",
    "of    the    system:        3 copies    of the software",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ("byte-level", "llama-3", "llama-2", "metaspace", "phi-3", "gemma")
BYTE_LEVEL = ("byte-level", "llama-3", "llama-bpe", "smaug-bpe", "qwen2", "gpt-4o", "tekken",
              "seed-coder", "deepseek-v3", "smollm")  # fmt: skip
"""GPT-2's own split, one like Llama 3's, and those of Llama 3's models (whole words first or not),
Qwen's, Phi-4-mini's, Mistral's, Seed-OSS's, Hunyuan's and SmolLM2's."""
PIECES = r"▁?\p{L}+|\p{N}|▁?[^▁\p{L}\p{N}]+|▁+(?=▁)|▁"
"""What SentencePiece learns from: spaces alone, words with one before them, digits one by one."""
RUNS = {char: [char * n for n in range(2, 32)] for char in "\n▁\t"}
"""Pieces of Gemma's that are of one sign alone, and merged before all others, the longest first."""


def _splits(kind: str) -> tuple[str, ...]:
    """The expressions that split text before the bytes; none: GPT-2's."""
    if kind == "byte-level":
        return ()
    if kind == "llama-3":
        return (
            r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        )
    return next(splits for (splits, _), name in PRE_TOKENIZERS.items() if name == kind)


def _byte_level(kind: str) -> Tokenizer:
    tokenizer, splits = Tokenizer(BPE()), _splits(kind)
    by_gpt2 = splits in ((), ("digits",))
    digits: Any = pre_tokenizers.Digits(individual_digits=True)
    steps = [
        digits if split == "digits" else pre_tokenizers.Split(Regex(split), "isolated")
        for split in splits
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if splits else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """As converted: characters without a token are bytes; Llama 2 has a space before every piece
    of text, Gemma before none (its Split finds no space any more), others before the first."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif kind == "gemma":
        tokenizer.normalizer = space
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    back += [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


@cache
def _trained(kind: str) -> str:
    byte_level = kind in BYTE_LEVEL
    tokenizer = _byte_level(kind) if byte_level else _sentencepiece(kind)
    tokens = SPECIAL if byte_level else [*SPECIAL, "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    learner = Tokenizer.from_str(tokenizer.to_str())
    if not byte_level:
        learner.normalizer = normalizers.Replace(" ", "▁")
        learner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    learner.train_from_iterator(CORPUS, trainer)
    learned, made = json.loads(learner.to_str()), json.loads(tokenizer.to_str())
    made["model"] |= {key: learned["model"][key] for key in ("vocab", "merges")}
    made["model"]["ignore_merges"] = kind in ("llama-bpe", "tekken")
    special = learned["added_tokens"][: len(SPECIAL)]
    added = [token | {"rstrip": kind == "phi-3"} for token in special]
    runs = [run for runs in RUNS.values() for run in runs] if kind == "gemma" else []
    vocab = made["model"]["vocab"]
    for piece in ["\n", "\t", *runs] if runs else []:
        vocab.setdefault(piece, len(vocab))
    added += [special[0] | {"id": vocab[r], "content": r, "special": False} for r in runs]
    if not byte_level:
        made["model"]["merges"] = _every_split(made["model"], runs)
    made["added_tokens"] = added
    return json.dumps(made)


def _every_split(model: dict[str, Any], runs: list[str]) -> list[tuple[str, str]]:
    """Merges as conversions write them: a piece by every split into pieces, pieces in order, but
    those of runs, which have one score, by their length alone."""
    rank = {"".join(merge): -i for i, merge in reversed([*enumerate(model["merges"])])}
    rank |= dict.fromkeys(runs, 1)
    pieces = {piece: rank.get(piece, 2) for piece in model["vocab"]}
    return [m for m in generate_merges(model["vocab"], pieces) if "".join(m) in rank]


def tokenizer_of(kind: str, *, bos: bool = True, template: str | None = None) -> Any:
    """A tokenizer of a kind; bos: it puts <s> before every text."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def save_changed(
    folder: Path, kind: str, changes: dict[str, Any], settings: dict[str, Any] | None = None,
    *, bos: bool = True,
) -> None:  # fmt: skip
    """A tokenizer's files with values changed by hand: by their places in tokenizer.json, `a.0.b`,
    to others or by a function; settings: those of tokenizer_config.json."""
    tokenizer_of(kind, bos=bos).save_pretrained(folder)
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    read = json.loads(path.read_text())
    for place, value in changes.items():
        *above, last = (int(key) if key.isdigit() else key for key in place.split("."))
        held = reduce(getitem, above, read)
        held[last] = value(held[last]) if callable(value) else value
    path.write_text(json.dumps(read))
    beside.write_text(json.dumps(json.loads(beside.read_text()) | (settings or {})))


SIGNS = ["ab", "AB", "éß", "ÉÜ", "яЯ", "नि", "ครั", "عَ", "日本", "한국", "12", "٣½", ".,",
         "'s'T", "$+", "  ", "\n", "\r\t", "\u00a0\u3000", "😀\ufe0f", "e\u0301",
         "\u200d", "ǅʰ"]  # fmt: skip


def drawn_texts() -> list[str]:
    """Of two or three kinds of signs each."""
    draw = random.Random(0)
    kinds = [draw.sample(SIGNS, 2 + i % 2) for i in range(500)]
    return ["".join(draw.choice("".join(few)) for _ in range(12)) for few in kinds]


@cache
def _learned() -> dict[str, Any]:
    """A model that has learned pieces of the drawn texts, across all words."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=4000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(drawn_texts(), trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model


def save_learned(folder: Path, kind: str) -> list[str]:
    """A tokenizer of bytes that gives any other split of the drawn texts other ids; the texts."""
    save_changed(folder, kind, {f"model.{key}": _learned()[key] for key in ("vocab", "merges")})
    return drawn_texts()


def renamed_special(*texts: str) -> dict[str, Any]:
    """Other texts for the last special tokens, as changes."""
    last = range(len(SPECIAL) - len(texts), len(SPECIAL))
    new = {SPECIAL[i]: text for i, text in zip(last, texts, strict=True)}
    added = {f"added_tokens.{i}.content": new[SPECIAL[i]] for i in last}
    return added | {"model.vocab": lambda ids: {new.get(t, t): i for t, i in ids.items()}}


def put_around_texts(before: list[str], after: list[str]) -> dict[str, Any]:
    """A post-processor."""
    first, last = ([{"SpecialToken": {"id": t, "type_id": 0}} for t in tokens]
                   for tokens in (before, after))  # fmt: skip
    told = {t: {"id": t, "ids": [SPECIAL.index(t)], "tokens": [t]} for t in (*before, *after)}
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    return {"type": "TemplateProcessing", "single": single, "pair": PAIR, "special_tokens": told}


PAIR = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes thoughts before the last answer alone, and takes those of earlier ones out, as Qwen 3's.
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- set words = m.content %}
        {%- if '</think>' in words %}
            {%- set thoughts = words.split('</think>')[0].split('<think>')[-1] %}
            {%- set words = words.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + words.lstrip('\\n') }}
        {%- else %}
            {{- words }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_start|>\n\n"
    "{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] }}"
    " [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
WORDS_ALONE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "thinking": THINKING,
    "llama-3": LLAMA_3,
    "llama-2": LLAMA_2,
    "words alone": WORDS_ALONE,
}
