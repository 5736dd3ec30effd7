"""What a model says of given texts: likelihoods of continuations, and greedy generations.

All scoring goes through three calls that every form of a model answers (dense, masked, narrow,
ONNX). A document starts as in training: with BOS where the tokenizer adds it, else after the end
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from atp_edge.model.families import check_reads, longest_text, tokens_read
from atp_edge.run.watched import underway

Tokens = Sequence[int]
T = TypeVar("T")
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""A context and what follows it."""

# A shorter context costs less to read again than a pass of its own: of one row, a pass takes the
# time that reading the weights takes.
_SHARED_TOKENS = 32
SHORTEN = "shorten it, or leave it out"


class LanguageModel(Protocol):
    """What scoring asks of a model. More tokens than its window are refused."""

    @property
    def window(self) -> int | None:
        """Tokens that it reads at once; None: any number."""

    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        """Next-token logits [B, last, V] of the last positions of tokens [B, S], padded on the
        right (mask 0)."""

    def logits_after(self, prompt: Tokens, rows: Sequence[Tokens]) -> list[Tensor]:
        """Next-token logits [S, V] of every row of S tokens. Each follows the prompt, which is read
        once."""

    def generate(self, prompts: Sequence[Tokens], *, new_tokens: int, end: int) -> list[list[int]]:
        """Greedy new tokens of every prompt; a row stops before `end`."""


@dataclass(frozen=True)
class TorchModel:
    """A causal language model of transformers, or peft's, under the caller's autocast."""

    model: Any

    @property
    def window(self) -> int:
        return longest_text(self.model.config)

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        self._check(tokens.shape[1])
        device = next(self.model.parameters()).device
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        return self.model(**inputs, use_cache=False, logits_to_keep=last).logits

    @torch.no_grad()
    def logits_after(self, prompt: Tokens, rows: Sequence[Tokens]) -> list[Tensor]:
        self._check(len(prompt) + max(map(len, rows)))
        device = next(self.model.parameters()).device
        read = torch.tensor([prompt], device=device)
        past = self.model(input_ids=read, use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(len(rows))
        # No mask: padding lies on the right, where no real token sees it.
        tokens = padded(rows, 0)[0].to(device)
        logits = self.model(input_ids=tokens, past_key_values=past, use_cache=True).logits
        return [of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], *, new_tokens: int, end: int) -> list[list[int]]:
        self._check(tokens_read(max(map(len, prompts)) + new_tokens))
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

    def _check(self, tokens: int) -> None:
        check_reads(self.window, tokens, "a batch's longest text", SHORTEN)


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


Reads = Callable[[LanguageModel, Sequence[Pair]], list[Tensor]]
"""How pairs are read together: the logits [S, V] of every continuation of S tokens."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation: the sum of its log probabilities, and whether greedy gives it."""

    log: float
    tokens: int
    greedy: bool


def likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Tokens, Tokens]], *, batch_tokens: int
) -> list[Likelihood]:
    """Of every (context, continuation), both of one token or more. Equal pairs are scored once, and
    a long context that several continuations follow is read once.

    batch_tokens: padded tokens of a forward pass at most (or one row), its past among them. Raises
    ValueError, before anything is read, for an empty part and for a pair beyond the window.
    """
    keyed = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    if any(not context or not continuation for context, continuation in keyed):
        raise ValueError("a context or a continuation is empty; each needs one token or more")
    for number, pair in enumerate(keyed, start=1):
        check_reads(model.window, _read(pair), f"text {number} of {len(keyed)}", SHORTEN)
    # Longest first: memory is used up at the start or never; the order is fixed, so scores are too.
    distinct = sorted(set(keyed), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    groups = _of_one_context(distinct, batch_tokens)
    grouped = {pair for group in groups for pair in group}
    alone = [pair for pair in distinct if pair not in grouped]
    passes: list[tuple[Reads, Sequence[Pair]]] = [(_after_one_context, group) for group in groups]
    passes += [(_side_by_side, batch) for batch in batches_of(alone, _read, batch_tokens)]
    found: dict[Pair, Likelihood] = {}
    with underway("scoring answers", len(distinct)) as one_more:
        for logits_of, batch in passes:
            for pair, logits in zip(batch, logits_of(model, batch), strict=True):
                found[pair] = _likelihood(logits, pair[1])
                one_more()
    return [found[pair] for pair in keyed]


def _read(pair: Pair) -> int:
    return tokens_read(len(pair[0]) + len(pair[1]))


def _of_one_context(ordered: Sequence[Pair], batch_tokens: int) -> list[Sequence[Pair]]:
    """The pairs that share a context with others, group by group."""
    by_context: dict[tuple[int, ...], list[Pair]] = {}
    for pair in ordered:
        by_context.setdefault(pair[0], []).append(pair)
    return [
        group
        for context, sharing in by_context.items()
        if len(context) >= _SHARED_TOKENS
        for group in batches_of(sharing, _read, batch_tokens)
        if len(group) > 1
    ]


def _after_one_context(model: LanguageModel, group: Sequence[Pair]) -> list[Tensor]:
    """Logits [S, V] of every pair's continuation of S tokens. The context's last token is read with
    the continuation, whose first token it predicts."""
    context = group[0][0]
    return model.logits_after(context[:-1], [context[-1:] + rest[:-1] for _, rest in group])


def _side_by_side(model: LanguageModel, batch: Sequence[Pair]) -> list[Tensor]:
    """The same, every context read for itself."""
    tokens, mask = padded([(context + continuation)[:-1] for context, continuation in batch], 0)
    # From the first token that any row asks for: a third of the work is the vocabulary.
    start = min(len(context) for context, _ in batch) - 1
    logits = model.logits(tokens, mask, last=tokens.shape[1] - start)
    firsts = [len(context) - 1 - start for context, _ in batch]
    return [
        row[first : first + len(continuation)]
        for row, first, (_, continuation) in zip(logits, firsts, batch, strict=True)
    ]


def _likelihood(logits: Tensor, continuation: Tokens) -> Likelihood:
    """logits [S, V]: of every token of the continuation."""
    log_p = logits.float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=log_p.device)
    return Likelihood(
        log=float(log_p.gather(-1, wanted[:, None]).sum()),
        tokens=len(continuation),
        greedy=bool((log_p.argmax(-1) == wanted).all()),
    )


def batches_of(
    ordered: Sequence[T], length: Callable[[T], int], batch_tokens: int
) -> Iterator[Sequence[T]]:
    """Runs of `ordered` (longest first) whose padded sizes stay within batch_tokens."""
    start = 0
    while start < len(ordered):
        count = max(1, batch_tokens // length(ordered[start]))
        yield ordered[start : start + count]
        start += count
