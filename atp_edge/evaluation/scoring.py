"""What a model says of given texts: likelihoods of continuations, and greedy generations.

All scoring goes through two calls that every form of a model answers (dense, masked, narrow, ONNX).
A document starts as in training: with BOS where the tokenizer adds it, else after the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from atp_edge.run.watched import underway

Tokens = Sequence[int]
T = TypeVar("T")


class LanguageModel(Protocol):
    """What scoring asks of a model."""

    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        """Next-token logits [B, last, V] of the last positions of tokens [B, S], padded on the
        right (mask 0)."""

    def generate(self, prompts: Sequence[Tokens], *, new_tokens: int, end: int) -> list[list[int]]:
        """Greedy new tokens of every prompt; a row stops before `end`."""


@dataclass(frozen=True)
class TorchModel:
    """A causal language model of transformers, or peft's, under the caller's autocast."""

    model: Any

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        device = next(self.model.parameters()).device
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        return self.model(**inputs, use_cache=False, logits_to_keep=last).logits

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], *, new_tokens: int, end: int) -> list[list[int]]:
        device = next(self.model.parameters()).device
        tokens, mask = padded(prompts, end, side="left")
        made = self.model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end,
        )
        rows = made[:, tokens.shape[1] :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def language_model(model: nn.Module | LanguageModel) -> LanguageModel:
    """A module of torch wrapped; anything else that scores as it is."""
    return TorchModel(model) if isinstance(model, nn.Module) else model


def padded(rows: Sequence[Tokens], fill: int, *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows as tokens and mask [B, longest]."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[i, place], mask[i, place] = torch.tensor(row), 1
    return tokens, mask


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation: the sum of its log probabilities, and whether greedy gives it."""

    log: float
    tokens: int
    greedy: bool


def likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Tokens, Tokens]], *, batch_tokens: int
) -> list[Likelihood]:
    """Of every (context, continuation), both of one token or more; equal pairs are scored once.

    batch_tokens: padded tokens of a forward pass at most (or one row).
    """
    keyed = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    if any(not context or not continuation for context, continuation in keyed):
        raise ValueError("a context or a continuation is empty; each needs one token or more")
    # Longest first: memory is used up at the start or never; the order is fixed, so scores are too.
    distinct = sorted(set(keyed), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    found: dict[Any, Likelihood] = {}
    with underway("scoring answers", len(distinct)) as one_more:
        for batch in batches_of(distinct, lambda p: len(p[0]) + len(p[1]) - 1, batch_tokens):
            tokens, mask = padded(
                [(context + continuation)[:-1] for context, continuation in batch], 0
            )
            # From the first token that any row asks for: a third of the work is the vocabulary.
            start = min(len(context) for context, _ in batch) - 1
            logits = model.logits(tokens, mask, last=tokens.shape[1] - start)
            for row, (context, continuation) in zip(logits, batch, strict=True):
                first = len(context) - 1 - start
                log_p = row[first : first + len(continuation)].float().log_softmax(-1)
                wanted = torch.tensor(continuation, device=log_p.device)
                found[context, continuation] = Likelihood(
                    log=float(log_p.gather(-1, wanted[:, None]).sum()),
                    tokens=len(continuation),
                    greedy=bool((log_p.argmax(-1) == wanted).all()),
                )
                one_more()
    return [found[pair] for pair in keyed]


def batches_of(
    ordered: Sequence[T], length: Callable[[T], int], batch_tokens: int
) -> Iterator[Sequence[T]]:
    """Runs of `ordered` (longest first) whose padded sizes stay within batch_tokens."""
    start = 0
    while start < len(ordered):
        count = max(1, batch_tokens // length(ordered[start]))
        yield ordered[start : start + count]
        start += count
