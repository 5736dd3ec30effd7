"""Time to the first token of a long prompt: models in turn within a round, many short rounds.

A prefill is one sample where a generation is a hundred, so it needs more rounds. Its ratios are
taken within them: a busy second falls on one round, and the median leaves that round out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_bench.engines import OURS, Engine, open_engine
from atp_bench.engines.latency import prefills
from atp_bench.interleaved_timing import interleaved_rounds, rotating
from atp_bench.paired import PairedRatio, paired_ratio


@dataclass(frozen=True, kw_only=True)
class FirstTokens:
    """ms: medians over rounds by model. pairs: by "a : b" (above 1: b is faster)."""

    prompt_tokens: int
    rounds: int
    ms: dict[str, float]
    pairs: dict[str, PairedRatio]


def bench_first_token(
    folders: Mapping[str, Path],
    pairs: Sequence[tuple[str, str]],
    *,
    prompt_tokens: int,
    rounds: int,
    threads: int,
) -> FirstTokens:
    """Measure exported folders on our runtime, after a round of warm-up."""
    engines = {name: open_engine(OURS, f, threads) for name, f in folders.items()}
    return paired_first_tokens(engines, pairs, prompt_tokens=prompt_tokens, rounds=rounds)


def paired_first_tokens(
    engines: Mapping[str, Engine],
    pairs: Sequence[tuple[str, str]],
    *,
    prompt_tokens: int,
    rounds: int,
) -> FirstTokens:
    """As `bench_first_token`, of loaded engines. Raises ValueError for less than one round."""

    def prefill_ms(names: list[str]) -> dict[str, float]:
        taken = prefills({n: engines[n] for n in names}, 1, prompt_tokens, prompt_tokens + 1)
        return {name: ms for name, (_, ms) in taken.items()}

    measured = interleaved_rounds(engines, prefill_ms, rounds, order=rotating)
    return FirstTokens(
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        ms={name: statistics.median(times) for name, times in measured.items()},
        pairs={f"{a} : {b}": paired_ratio(measured[a], measured[b]) for a, b in pairs},
    )
