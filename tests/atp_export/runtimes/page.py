"""docs/runtimes.md, from the results alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from atp_export.genai_tokenizer import (
    LIKE_GEMMA,
    LIKE_GPT4O,
    LIKE_LLAMA,
    LIKE_LLAMA3,
    LIKE_SMOLLM2,
)
from atp_export.layouts.openvino_genai import TIE

from tests.atp_export.runtimes.cells import FAMILIES, FLAVOURS, GGUF, PRECISIONS, ROOT, WIDTHS, Cell

RESULTS, PAGE = ROOT / "docs" / "runtimes.json", ROOT / "docs" / "runtimes.md"
LLAMA_CPP = "llama.cpp"
HEAD = """\
# What loads where

Written by `python -m tests.atp_export.runtimes`: it cuts KV groups and channels from a tiny random
model of each family, exports it, and gives the runtime {count} pieces of licence texts, with
several spaces, new lines, numbers and letters outside ASCII. First the ids that the runtime's own
tokenizer makes are compared with those of the tokenizer that the model was trained with, then
{new} greedy tokens after each piece with those of `atp-edge generate` (llama.cpp: with PyTorch's,
by the file's weights). CPU, {date}; {seconds:.0f} s in the runtimes. Tests hold this page to
`runtimes.json`, which has the seconds of each cell, and repeat cells of it.

`yes`: the same ids and the same tokens. A number: the same ids, and where a token is another one,
it lies so many spreads of the logits below the best one, as near as the precision's arithmetic can
tell (at most {ties}; llama.cpp:
[gguf.md](gguf.md)). `no [n]`: the note below. `-`: not run.
"""
TAIL = """\
bf16 is for GPUs: the CPU providers have no bf16 MatMul. ONNX Runtime's CUDA provider
loads it; `atp_export.runtime` does not feed its bf16 cache yet and says so. `ort` is
opset 23 with com.microsoft operators, `standard` opset 23 alone, `portable` opset 18 (21
when quantized).

On a GPU `ort` in fp16 was tried by hand (ONNX Runtime 1.31.1's CUDA provider, an H200,
dense and slim SmolLM2-135M): both equal their PyTorch models as `atp-edge verify` asks.
`Session(folder, cuda_graph=True)` replays one further token as a CUDA graph: the same
tokens, in 1.3 ms instead of 3.1 ([log](research/log.md)). Tests hold on the CPU what a
graph needs: from token to token no buffer moves and no shape changes.

int8 and int4 of ONNX are rounded to the nearest here. `gptq`, a run's default for int4, writes
the same nodes with other numbers; `k-quant` gives MatMulNBits, GatherBlockQuantized and
DequantizeLinear a zero point a block more (tests: every flavour on ONNX Runtime; not
measured yet elsewhere).

No file makes ONNX Runtime warn, except one with adapters (once a LoRA factor, which is
an optional input). Where logits start is a constant of the file (all positions), which
`atp_export.runtime` alone makes an input, for prefills that need only the last position.

onnxruntime-genai's own tokenizer parts from transformers', without an error, where the texts above
do not go. `atp-edge export` and the folder's README.md say so of a tokenizer that it concerns
(`atp_export.genai_tokenizer`; tests hold both sides):

| tokenizer | other ids there for |
| --- | --- |
| bytes, split as GPT-2 does, and no more | none known but those below |
| bytes, split as Llama 3, Qwen, Phi-4-mini, Tekken do, and no more | {like_llama3} |
| Phi-4-mini's and Tekken's | also {like_gpt4o} |
| the same without tokens for some control characters (SmolLM2) | {like_smollm2} |
| SentencePiece like Gemma's | {like_gemma} |
| SentencePiece like Llama 2's, Mistral's, Phi-3's | {like_llama} |
| any other | not compared; some it does not load |

No folder says so of what is rare: of bytes, U+0085, letters newer than Unicode 13, and 'ſ (an
apostrophe and a long s) before a letter get other ids in any.

Others have a normalizer (Qwen's NFC), single digits, tokens that strip, more around a text than BOS
before it, merges twice or before those of their parts, words that no merge makes, dropout, bytes of
other text without a token, another split or decoder, or are no BPE (Unigram, WordPiece). Not
compared either are settings that it reads otherwise: no `eos_token`, or that of `bos_token` (it
puts EOS after a text), and `add_bos_token` or `add_eos_token` beside another post-processor. Of
any, it reads no further than U+0000.

By hand, with real vocabularies and the licence texts: Gemma 3's own tokenizer has the same ids in
391 of 400 (the others have such runs or Japanese sentences), Llama 2's in 343, and in each of
25,014 lines without two spaces in a row. llama.cpp has Gemma 3's ids in all.

optimum-onnx wants transformers 4, hence an environment of its own. Its ORTModelForCausalLM sizes
the first cache of every layer by `num_key_value_heads` and, for most families, by
`hidden_size / num_attention_heads`, neither of which is the file's where heads were cut. "Any
widths" is the class of `examples/onnx/optimum_any_widths.py`, which reads both from the file.
"""


@dataclass(frozen=True)
class Notes:
    """Why cells failed, numbered in the order of the page."""

    known: list[str] = field(default_factory=list)

    def short(self, says: str | None) -> str:
        if says is None:
            return "-"
        if not says.startswith("no: "):
            return says.removeprefix("near ")
        why = says.removeprefix("no: ")
        if why not in self.known:
            self.known.append(why)
        return f"no [{self.known.index(why) + 1}]"

    def lines(self) -> Iterator[str]:
        yield from (f"{i}. {why}" for i, why in enumerate(self.known, 1))


def render(results: dict[str, Any]) -> str:
    """The page."""
    notes = Notes()
    runtimes = results["runtimes"].values()
    head = HEAD.format(
        count=results["texts"], new=results["new_tokens"], date=results["date"],
        seconds=sum(cell["seconds"] for runtime in runtimes for cell in runtime["cells"].values()),
        ties=", ".join(f"{precision} {tie}" for precision, tie in TIE.items()),
    )  # fmt: skip
    others = [(f, p) for f in FAMILIES if f != "llama" for p in ("fp32", "int4")]
    lines = [
        head,
        "## Runtimes",
        "",
        *_table(
            ["runtime", "version", "tokenizer"],
            [[name, r["version"], r["tokenizer"]] for name, r in results["runtimes"].items()],
        ),
        "",
        "## Llama, with the demo model's tokenizer",
        "",
        *_table(
            ["runtime", "flavour", "widths", *PRECISIONS],
            _rows(results, notes, [("llama", precision) for precision in PRECISIONS]),
        ),
        "",
        "## Other families, with tokenizers of their kinds",
        "",
        *_table(
            ["runtime", "flavour", "widths", *map(" ".join, others)],
            _rows(results, notes, others),
        ),
        "",
        *notes.lines(),
        "",
        TAIL.format(
            like_gemma=_listed(LIKE_GEMMA),
            like_gpt4o=LIKE_GPT4O,
            like_llama=_listed(LIKE_LLAMA),
            like_llama3=LIKE_LLAMA3,
            like_smollm2=LIKE_SMOLLM2,
        ),
    ]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _listed(text: str) -> str:
    return re.sub(r",( and)? for", ";", text)


def _rows(
    results: dict[str, Any], notes: Notes, columns: Sequence[tuple[str, str]]
) -> Iterator[list[str]]:
    for name, runtime in results["runtimes"].items():
        for flavour in (GGUF,) if name == LLAMA_CPP else FLAVOURS:
            for widths in WIDTHS:
                cells = [
                    Cell(family=family, flavour=flavour, widths=widths, precision=precision)
                    for family, precision in columns
                ]
                found = [runtime["cells"].get(str(cell)) for cell in cells]
                if any(found):
                    said = (notes.short(cell["says"] if cell else None) for cell in found)
                    yield [name, flavour, widths, *said]


def _table(head: Sequence[str], rows: Iterator[list[str]] | Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
