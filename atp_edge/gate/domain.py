"""The profile of a run's domain for the fail-safe, its threshold, and how often it errs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from atp_export.runtime.domain import LENGTHS, DomainProfile, profile_bits

from atp_edge.data.documents import Document
from atp_edge.data.encoding import Encoder
from atp_edge.gate.counterfactuals import SENTENCES
from atp_edge.gate.results import Check

FALSE_ALARMS = 0.05
"""Of the held-out prompts that the threshold is set on."""
WINDOWS = 400
SHOWN = 32
_FEWEST = 20  # prompts that set a threshold, and that tell how often it errs


def profile_of(
    train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], seed: int
) -> DomainProfile:
    """The pairs of the train split's documents, as ids; thresholds by the decision split, for every
    length that it has prompts of and that anything can lie above."""
    bits = profile_bits(train)
    profile, thresholds = DomainProfile(bits=bits, thresholds={}), {}
    for length in LENGTHS:
        scores = [profile.score(x) for x in windows(held_out, length, seed)]
        if len(scores) >= _FEWEST:
            threshold = float(np.quantile(scores, 1 - FALSE_ALARMS))
            if threshold < 1:  # no score is above 1: nothing would be outside
                thresholds[length] = threshold
    return DomainProfile(bits=bits, thresholds=thresholds)


def error_rates(
    profile: DomainProfile, own: Sequence[Sequence[int]], other: Sequence[Sequence[int]], seed: int
) -> dict[str, Any]:
    """By length: the share of the domain's own prompts that are called outside, and of others that
    are not."""
    found: dict[str, Any] = {}
    for length in profile.thresholds:
        alarms = [profile.distance(x).outside for x in windows(own, length, seed)]
        misses = [not profile.distance(x).outside for x in windows(other, length, seed)]
        if alarms and misses:
            found[str(length)] = {
                "false_alarms": float(np.mean(alarms)), "misses": float(np.mean(misses)),
                "own_prompts": len(alarms), "other_prompts": len(misses),
            }  # fmt: skip
    return found


def check_fail_safe(errors: dict[str, Any]) -> list[Check]:
    """What the fail-safe's two error rates are on prompts of 32 tokens (or the next shorter); it
    never keeps a model from shipping."""
    lengths = [name for name in errors if int(name) <= SHOWN]
    if not lengths:
        return [
            Check(
                name="fail-safe",
                status="undecided",
                text="fail-safe: the text has too few documents, or too short ones, to tell what "
                "lies outside of it: do not rely on it",
                required=False,
            )
        ]
    one = errors[max(lengths, key=int)]
    enough = one["own_prompts"] >= _FEWEST
    fit = enough and one["false_alarms"] <= 3 * FALSE_ALARMS and one["misses"] <= 0.5
    few = "" if enough else f", of {one['own_prompts']} prompts alone"
    return [
        Check(
            name="fail-safe",
            status="passed" if fit else "undecided",
            text=f"fail-safe on prompts of {max(lengths, key=int)} tokens: "
            f"{one['false_alarms']:.1%} false alarms on the domain's text, {one['misses']:.1%} of "
            "other text missed" + few + ("" if fit else ": do not rely on it"),
            required=False,
            items=one["own_prompts"],
            clusters=one["own_prompts"],
        )
    ]


def other_text(domain: str, tokenizer: Any) -> list[list[int]]:
    """Text of other domains: the built-in ones that are installed, and everyday sentences."""
    from atp_edge.data.domains import DOMAINS

    texts = [" ".join(f"They say that somebody {x}" for x in SENTENCES["general"])]
    for name, read in DOMAINS.items():
        if name != domain:
            try:
                texts += [text for text, _ in read()[:300]]
            except ValueError:  # its package is an extra
                continue
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def windows(texts: Sequence[Sequence[int]], length: int, seed: int) -> list[Sequence[int]]:
    """Prompts of a length, drawn from texts that are long enough, a text as often as another."""
    draw = random.Random(f"{seed} {length}")
    long_enough = [text for text in texts if len(text) >= length]
    if not long_enough:
        return []
    found = []
    for _ in range(min(WINDOWS, 8 * len(long_enough))):
        text = draw.choice(long_enough)
        at = draw.randrange(len(text) - length + 1)
        found.append(text[at : at + length])
    return found


def ids_of(documents: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    """Documents as ids."""
    return [ids for ids, _ in Encoder(tokenizer).encode_all(documents)]
