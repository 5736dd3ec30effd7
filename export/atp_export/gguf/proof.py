"""Proof that a GGUF file computes what its checkpoint does.

1. Its tensors, read back by the `gguf` package, are the checkpoint's, or lie as near as their type
   allows (bounds.py).
2. llama.cpp gives the tokenizer's ids.
3. llama.cpp agrees with the PyTorch model that holds the file's own weights: greedy tokens, and
   perplexity on text. q8_0 and q4_0 are computed with activations of 8 bits there, and every cache
   is f16, so tokens may part where the two best logits are about as good.

Without llama.cpp at hand only 1 is done, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from torch import Tensor

from atp_edge.data.encoding import added_around
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.families import check_reads, longest_text, model_shape
from atp_export.gguf.architecture import architecture_of
from atp_export.gguf.bounds import fault
from atp_export.gguf.llama_cpp import Answers, ask
from atp_export.gguf.places import HEAD, places_of
from atp_export.gguf.rope import angles_of
from atp_export.gguf.tensors import GgufPrecision
from atp_export.gguf.vocabulary import kept_ends
from atp_export.gguf.write import ends_of
from atp_export.verification.checks import Check, at_most, none_of

TIE = {"f32": 0.01, "f16": 0.05, "q8_0": 1.0, "q4_0": 1.0}
"""How far below the best logit one may lie that llama.cpp took, over the logits' spread. Chosen: no
arithmetic bounds what a roundoff of activations becomes after some layers. So are the next."""
PERPLEXITY = {"f32": 1.005, "f16": 1.005, "q8_0": 1.1, "q4_0": 1.1}
"""Perplexity by llama.cpp over PyTorch's, or the other way round, at most. Measured on the dense
SmolLM2-135M: f32 1.0001, q8_0 1.010."""
TEXTS = (
    "In 2024 it cost 1,234.50 dollars; I'LL pay 3.14159% of it, don't you?",
    "def f(x):\n    return {'a': x ** 2}\t# tabs\r\n\r\n  and   spaces  ",
    "Füße, naïve façade, Ελληνικά, русский, 日本語の文章, العربية, 😀👍🏽",
)
"""Where pre-tokenizers differ: digits, contractions, white space, scripts."""


@dataclass(frozen=True, kw_only=True)
class GgufProof:
    """release: llama.cpp's, None where it was not asked. perplexity: of the text blocks, by the
    checkpoint, by PyTorch with the file's weights, and by llama.cpp."""

    checks: tuple[Check, ...]
    release: str | None = None
    greedy_same: int = 0
    greedy_total: int = 0
    exact_perplexity: float
    torch_perplexity: float
    llama_perplexity: float | None = None
    token_ms: float | None = None

    @property
    def failures(self) -> list[str]:
        """What the checks that failed say."""
        return [check.says for check in self.checks if not check.passed]


@torch.no_grad()
def prove_gguf(
    checkpoint: Path,
    file: Path,
    precision: GgufPrecision,
    tokenizer: Any,
    *,
    prompts: Sequence[str],
    blocks: Tensor,
    node: Path | None,
    new_tokens: int = 64,
) -> GgufProof:
    """blocks: token ids [N, T] of text for the perplexity. node: see `node_folder`. new_tokens: at
    most, as the model reads. Raises ValueError for text that it does not read whole."""
    model: Any = load_narrow(checkpoint)
    longest = longest_text(model.config)
    check_reads(longest, blocks.shape[1], "a block of text", "take shorter blocks")
    count = blocks[:, 1:].numel()
    exact = math.exp(_nats(model, blocks) / count)
    checks = [_hold(model, file)]
    perplexity = math.exp(_nats(model, blocks) / count)
    if node is None:
        return GgufProof(checks=tuple(checks), exact_perplexity=exact, torch_perplexity=perplexity)
    texts = [*prompts, *TEXTS]
    rows = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    longest_prompt = max(map(len, rows), default=0)
    check_reads(longest, longest_prompt + 1, "a prompt and a new token", "take shorter prompts")
    new_tokens = min(new_tokens, longest - longest_prompt)
    ends = kept_ends(tokenizer.eos_token_id, ends_of(checkpoint))
    answers = ask(file, node, texts=texts, prompts=rows, new_tokens=new_tokens,
                  blocks=blocks.tolist(), ends=ends)  # fmt: skip
    theirs = math.exp(sum(answers.nats) / count)
    ratio = max(theirs / perplexity, perplexity / theirs)
    same, greedy = _greedy(model, rows, answers, precision)
    checks += [
        none_of("ids", _other_ids(tokenizer, texts, answers), "text that it splits otherwise"),
        none_of("ends", _other_ends(tokenizer, ends, answers), "first or end token that is missed"),
        greedy,
        at_most("perplexity", ratio, PERPLEXITY[precision],
                f"llama.cpp's perplexity is {theirs:.3f}, PyTorch's {perplexity:.3f}"),
    ]  # fmt: skip
    return GgufProof(
        checks=tuple(checks),
        release=answers.release,
        greedy_same=same,
        greedy_total=len(rows),
        exact_perplexity=exact,
        torch_perplexity=perplexity,
        llama_perplexity=theirs,
        token_ms=answers.token_ms,
    )


def _hold(model: Any, file: Path) -> Check:
    """Give the model the file's tensors; the check that they are its own."""
    shape = model_shape(model.config)
    named = architecture_of(model.config, shape, context=1)
    places = places_of(shape, named, angles_of(model.config, shape, named))
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    state, faults = model.state_dict(), []
    sources = {place.source for place in places} | ({HEAD} if shape.tied else set())
    faults += [f"{name} has no place in the file" for name in state if name not in sources]
    for place in places:
        if place.target not in stored:
            faults.append(f"{place.source} is not in the file")
            continue
        tensor, own = stored[place.target], state[place.source]
        kind = tensor.tensor_type.name
        value = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type)))
        found = fault(value, place.stored(own.float()), kind)
        if found:
            faults.append(f"{place.source}: {found}")
        own[slice(*(place.rows or (None,)))] = place.restored(value)
    return none_of("weights", faults, "tensor that is not the checkpoint's")


def _nats(model: Any, blocks: Tensor) -> float:
    return sum(
        float(model(block[None], labels=block[None]).loss) * (len(block) - 1) for block in blocks
    )


def _other_ids(tokenizer: Any, texts: Sequence[str], answers: Answers) -> list[str]:
    faults = []
    for text, theirs in zip(texts, answers.ids, strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if own != theirs:
            at = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), 0)
            faults.append(f"{text[:40]!r}, from its token {at} on")
    return faults


def _other_ends(tokenizer: Any, ends: Sequence[int], answers: Answers) -> list[str]:
    faults = [
        f"{tokenizer.convert_ids_to_tokens(end)!r} ends no text there"
        for end, ended in zip(ends, answers.ended, strict=True)
        if not ended
    ]
    before, _ = added_around(tokenizer)
    if list(before) != ([tokenizer.bos_token_id] if answers.first else []):
        faults.append(f"{list(before)} is put before a text by the tokenizer, and not there")
    return faults


def _greedy(
    model: Any, rows: Sequence[list[int]], answers: Answers, precision: GgufPrecision
) -> tuple[int, Check]:
    """How many prompts go on alike, and whether every token that llama.cpp took, after those that
    it took before, is PyTorch's best or about as good."""
    same, worst, says = 0, 0.0, "every greedy token is PyTorch's best"
    for i, (row, made) in enumerate(zip(rows, answers.tokens, strict=True)):
        logits = model(torch.tensor([[*row, *made]])).logits[0, len(row) - 1 : -1]
        taken = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
        below = (logits.max(1).values - taken) / logits.std()
        below = below.nan_to_num(nan=math.inf)
        same += int(float(below.max()) == 0)
        if float(below.max()) > worst:
            worst, at = float(below.max()), int(below.argmax())
            says = f"prompt {i}: its new token {at} lies {worst:.2g} spreads below PyTorch's best"
    return same, at_most("greedy", worst, TIE[precision], says)
