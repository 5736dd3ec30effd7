"""What is asked of a session: the same of the fp32 form and of what ships.

One long text, past every window: at each of several places it is read up to there at once, then by
several tokens together, then one at a time, by the cache that the reading before left. And a ragged
batch, padded on either side, at once and token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atp_export.runtime import Floats, Generation, Session
from atp_export.runtime.session import load

How = Literal[
    "at once", "in parts", "step by step", "left padding", "right padding", "as others run it"
]
CPU = "CPUExecutionProvider"
TOGETHER = 8
STEPS = 4
ROW_LENGTHS = (5, 8, 3)
ROW_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """texts: a long one, then the rows of the batch with the tokens that are fed to it one by one.
    places: tokens of the long text that are read at once, before TOGETHER and STEPS more."""

    texts: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]

    @property
    def positions(self) -> list[list[int]]:
        """By text, the positions whose logits are asked for."""
        after = TOGETHER + STEPS
        long = {p for place in (1, *self.places) for p in range(place - 1, place + after)}
        return [sorted(long), *(list(range(len(text))) for text in self.texts[1:])]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Logits [n, V] at some positions of one text."""

    how: How
    text: int
    positions: tuple[int, ...]
    logits: Floats


def asked_of(tokens: Sequence[int], length: int) -> Asked:
    """Texts of these tokens, over again where they are fewer than `length`."""
    text = tuple(np.resize(np.array(tokens, np.int64), length).tolist())
    last = length - TOGETHER - STEPS
    if last < 1:
        raise ValueError(f"a context of {length} is too short to prove anything in")
    places = sorted({min(place, last) for place in (1, length // 8, last)} - {0})
    starts = [i * len(text) // 7 for i in range(len(ROW_LENGTHS))]
    rows = (
        tuple(np.roll(text, -start)[: size + ROW_STEPS].tolist())
        for start, size in zip(starts, ROW_LENGTHS, strict=True)
    )
    return Asked(texts=(text, *rows), places=tuple(places))


def as_others_run_it(folder: Path, asked: Asked) -> Rows:
    """What a session of an fp32 graph answers to the file alone, without the input that our runtime
    adds to it. One session: two would hold its weights twice."""
    path = folder / "model.onnx"
    plain = load(path, path.read_bytes(), CPU)
    ids = np.array([asked.texts[0][:TOGETHER]], np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs = {i.name: i for i in plain.get_inputs()}
    if "position_ids" in inputs:
        feed["position_ids"] = np.arange(TOGETHER)[None]
    for name, i in inputs.items():
        if name.startswith("past_key_values."):
            feed[name] = np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
    (logits,) = plain.run(["logits"], feed)
    return Rows(how="as others run it", text=0, positions=tuple(range(TOGETHER)), logits=logits[0])


def observe(session: Session, asked: Asked) -> Iterator[Rows]:
    """What a session answers."""
    for place in asked.places:
        yield from _along(session, asked.texts[0], place)
    for how in ("left padding", "right padding"):
        yield from _batch(session, asked.texts[1:], how)


def _along(session: Session, text: Sequence[int], place: int) -> Iterator[Rows]:
    state = Generation(session, 1, place + TOGETHER + STEPS)
    ids = np.array([text], np.int64)
    first = state.step(ids[:, :place], last_only=True)[0]
    yield Rows(how="at once", text=0, positions=(place - 1,), logits=first)
    end = place + TOGETHER
    parts = state.step(ids[:, place:end])[0]
    yield Rows(how="in parts", text=0, positions=tuple(range(place, end)), logits=parts)
    for i in range(end, end + STEPS):
        one = state.step(ids[:, i : i + 1])[0]
        yield Rows(how="step by step", text=0, positions=(i,), logits=one)


def _batch(session: Session, texts: Sequence[Sequence[int]], how: Any) -> Iterator[Rows]:
    sizes = [len(text) - ROW_STEPS for text in texts]
    longest = max(sizes)
    ids = np.zeros((len(texts), longest), np.int64)
    mask = np.zeros_like(ids)
    for i, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        place = slice(longest - size, None) if how == "left padding" else slice(size)
        ids[i, place], mask[i, place] = text[:size], 1
    state = Generation(session, len(texts), longest + ROW_STEPS)
    every = state.step(ids, mask)
    for i, size in enumerate(sizes):
        yield Rows(how=how, text=i + 1, positions=tuple(range(size)), logits=every[i][mask[i] == 1])
    for count in range(ROW_STEPS):
        fed = np.array([[text[size + count]] for text, size in zip(texts, sizes, strict=True)])
        logits = state.step(fed)
        for i, size in enumerate(sizes):
            yield Rows(how=how, text=i + 1, positions=(size + count,), logits=logits[i])
