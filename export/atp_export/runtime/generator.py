"""Generation with an exported folder: tokens, and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from atp_edge.data.encoding import prompt_ids
from atp_edge.run.watched import counted
from atp_export.runtime.domain import PROFILE, Distance, read_profile
from atp_export.runtime.generation import Generation, Tokens
from atp_export.runtime.sampling import Sampling, choose, cut
from atp_export.runtime.session import Session

Prompt = str | Sequence[int]
"""A text, or the ids of one (`atp_edge.data.chat.chat_ids`)."""
_TOKENS_TOGETHER = 64


class Generator:
    """Text from an exported folder."""

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        # Only text needs transformers, which takes seconds and 300 MB to import.
        from atp_edge.model.loading import load_tokenizer

        self.session = Session(folder, provider=provider, threads=threads, adapter=adapter)
        self.tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.ends = self.session.ends | ({self.tokenizer.eos_token_id} - {None})
        path = _profile_of(folder)
        self.domain = read_profile(path) if path else None

    def distance(self, prompt: str) -> Distance:
        """How far a prompt lies outside the model's domain. Raises ValueError where no profile of
        it lies in the folder or beside it."""
        if self.domain is None:
            raise ValueError(
                f"no {PROFILE} in {self.session.folder} or beside it: `atp-edge gate` writes it"
            )
        return self.domain.distance(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Completions of a batch of prompts, without the prompts."""
        rows = [self._ids(prompt) for prompt in prompts]
        new = generate_tokens(
            self.session, rows, max_new_tokens=max_new_tokens, sampling=sampling, ends=self.ends
        )
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [cut(text, stop) for text in texts]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of one completion as they come; a stop string and all after it is never shown."""
        ids = self._ids(prompt)
        held, shown = max((len(s) for s in stop), default=1) - 1, 0
        tokens: list[int] = []
        text = ""
        for token in stream_tokens(self.session, ids, max_new_tokens, sampling or Sampling()):
            if token in self.ends:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if len(cut(text, stop)) < len(text):
                text, held = cut(text, stop), 0
                break
            # Half a character decodes to U+FFFD: wait for its other bytes.
            until = max(shown, len(text.rstrip("\ufffd")) - held)
            if until > shown:
                yield text[shown:until]
                shown = until
        yield text[shown:]

    def _ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


def stream_tokens(
    session: Session, ids: Sequence[int], max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """New tokens of one row, one at a time. Raises ValueError, before any, as `generate_tokens`."""
    _check(session, [ids], max_new_tokens)
    # The last new token is never fed.
    state = Generation(session, 1, len(ids) + max_new_tokens - 1)
    draw = np.random.default_rng(sampling.seed)
    logits = state.step(np.array([ids], np.int64), last_only=True)
    for count in range(max_new_tokens):
        token = choose(logits[0, -1], sampling, draw)
        yield token
        if count + 1 < max_new_tokens:
            logits = state.step(np.array([[token]], np.int64))


def generate_tokens(
    session: Session,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    ends: AbstractSet[int] = frozenset(),
) -> list[list[int]]:
    """New tokens of every row of a ragged batch; a row ends before a token of `ends`.

    Raises ValueError for an empty prompt, a token that the vocabulary has not, and more tokens than
    the context.
    """
    sampling = sampling or Sampling()
    _check(session, rows, max_new_tokens)
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    state = Generation(session, len(rows), longest + max_new_tokens - 1)
    logits = state.step(tokens, mask, last_only=True)[:, 0]
    draw = np.random.default_rng(sampling.seed)
    new: list[list[int]] = [[] for _ in rows]
    done = np.zeros(len(rows), bool)
    for count in range(max_new_tokens):
        chosen = np.array([choose(row, sampling, draw) for row in logits], np.int64)
        done |= np.isin(chosen, list(ends))
        for i, token in enumerate(chosen.tolist()):
            if not done[i]:
                new[i].append(token)
        if done.all() or count + 1 == max_new_tokens:
            break
        logits = state.step(chosen[:, None])[:, -1]
    return new


def _check(session: Session, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens} new tokens: expected 1 or more")
    if any(not row for row in rows):
        raise ValueError("a prompt is empty: every prompt needs one token or more")
    foreign = [token for row in rows for token in row if not 0 <= token < session.vocabulary]
    if foreign:
        raise ValueError(
            f"token {foreign[0]} of a prompt: the model knows those from 0 to "
            f"{session.vocabulary - 1}; use its own tokenizer"
        )


def perplexity(session: Session, ids: Tokens, labels: Tokens) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T], as
    atp_edge.evaluation.task_scores.perplexity computes it (labels -100 are not counted)."""
    total, count = 0.0, 0
    pairs = list(zip(ids, labels[:, 1:], strict=True))
    for row, following in counted(pairs, "measuring"):
        state = Generation(session, 1, len(row))
        # Some tokens at a time: logits of all are gigabytes where the vocabulary is large.
        for start in range(0, len(following), _TOKENS_TOGETHER):
            wanted = following[start : start + _TOKENS_TOGETHER]
            logits = state.step(row[None, start : start + len(wanted)])[0].astype(np.float64)
            peak = logits.max(-1, keepdims=True)
            log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
            answers = wanted != -100
            chosen = np.take_along_axis(logits, np.where(answers, wanted, 0)[:, None], 1)[:, 0]
            total += float((log_sum - chosen)[answers].sum())
            count += int(answers.sum())
    return float(np.exp(total / count))


def _profile_of(folder: Path) -> Path | None:
    """The profile of the model's domain: in the folder, or beside it. In a run's folder, what lies
    beside is of its own onnx/ alone."""
    beside = folder.parent
    foreign = (beside / "config.toml").is_file() and folder.name != "onnx"
    places = [folder / PROFILE] if foreign else [folder / PROFILE, beside / PROFILE]
    return next((file for file in places if file.is_file()), None)
