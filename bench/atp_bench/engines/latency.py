"""Latency of exported models, in turn within one run: ratios, not absolute times, travel.

`atp-edge bench --out RUN --json FILE` writes the report.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atp_bench.engines import OURS, Engine, Run, open_engine
from atp_bench.engines.memory import peak_memory_and_load
from atp_bench.interleaved_timing import interleaved_rounds
from atp_bench.paired import ratios
from atp_edge.run.environment import environment

# What a model generates before the next one's turn.
TURN_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one model; latencies are medians over rounds unless a percentile is named.

    token_ms: of a step, which gives every row of the batch one token.
    """

    first_token_ms: float
    token_ms_p50: float
    token_ms_p95: float
    tokens_per_s: float
    load_ms: float
    file_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Rows by model, ratios of the first to the last (larger: the last is better), settings.

    spreads: the smallest and the largest ratio of a single round, for the latencies.
    pairs: the same for every pair asked for, "a : b"; its latencies are medians of the ratios
    within each round: a busy minute is in both.
    """

    rows: dict[str, Row]
    ratios: dict[str, float]
    spreads: dict[str, tuple[float, float]]
    pairs: dict[str, dict[str, float | tuple[float, float]]]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Round:
    first_token_ms: float
    token_ms: list[float]

    @property
    def token_ms_p50(self) -> float:
        return statistics.median(self.token_ms)


def bench_onnx(
    folders: Mapping[str, Path],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    rounds: int = 5,
    batch: int = 1,
    threads: int | None = None,
    engines: Mapping[str, str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> BenchReport:
    """Measure exported folders round by round, in turns within each, after a short warm-up.

    batch: rows decoded together, all of them of these lengths; tokens per second are of all rows.
    engines: which engine runs a folder, ours if it is not named. pairs: names to compare besides
    the first and the last. Token counts are fixed: no model ends early. Raises ValueError for
    settings below 1 or a single folder.
    """
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch}
    _check(folders, lengths | {"rounds": rounds})
    kind = {name: (engines or {}).get(name, OURS) for name in folders}
    memory = {
        n: peak_memory_and_load(f, threads=threads, engine=kind[n], **lengths)
        for n, f in folders.items()
    }
    loaded = {n: open_engine(kind[n], f, threads) for n, f in folders.items()}

    def one(names: list[str], new_tokens: int) -> dict[str, _Round]:
        return _round({n: loaded[n] for n in names}, batch, prompt_tokens, new_tokens)

    measured = interleaved_rounds(
        loaded,
        partial(one, new_tokens=new_tokens),
        rounds,
        warm_up=partial(one, new_tokens=min(new_tokens, TURN_TOKENS)),
    )
    rows = {n: _row(measured[n], batch, folder, *memory[n]) for n, folder in folders.items()}
    first, *_, last = rows
    return BenchReport(
        rows=rows,
        ratios=_ratios(rows[first], rows[last]),
        spreads=_spreads(measured[first], measured[last]),
        pairs={
            f"{a} : {b}": {**_ratios(rows[a], rows[b]), **_paired(measured[a], measured[b])}
            for a, b in pairs
        },
        settings=lengths
        | {"rounds": rounds, "provider": loaded[first].provider, "threads": threads},
        environment=environment(),
    )


def _check(folders: Mapping[str, Path], settings: Mapping[str, int]) -> None:
    if len(folders) < 2:
        raise ValueError(
            f"got {len(folders)} model(s) ({', '.join(folders) or 'none'}): expected two or more "
            "folders to compare, the reference first"
        )
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: expected 1 or more")


def _round(
    engines: Mapping[str, Engine], batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, _Round]:
    """One generation of every engine: the prefills in turn, then tokens in turns of
    TURN_TOKENS."""
    started = prefills(engines, batch, prompt_tokens, prompt_tokens + new_tokens + 1)
    times: dict[str, list[float]] = {name: [] for name in started}
    for done in range(0, new_tokens, TURN_TOKENS):
        for name, (run, _) in started.items():
            for _ in range(min(TURN_TOKENS, new_tokens - done)):
                began = time.perf_counter()
                run.next()
                times[name].append((time.perf_counter() - began) * 1e3)
    return {
        name: _Round(first_token_ms=first_ms, token_ms=times[name])
        for name, (_, first_ms) in started.items()
    }


def prefills(
    engines: Mapping[str, Engine], batch: int, prompt_tokens: int, capacity: int
) -> dict[str, tuple[Run, float]]:
    """Every engine's run after its first token, and what that took in ms; one after the other."""
    runs = {name: engine.start(batch, capacity) for name, engine in engines.items()}
    started: dict[str, tuple[Run, float]] = {}
    for name, run in runs.items():
        vocabulary = engines[name].vocabulary
        prompts = np.random.default_rng(0).integers(5, vocabulary, (batch, prompt_tokens))
        began = time.perf_counter()
        run.first(prompts)
        started[name] = (run, (time.perf_counter() - began) * 1e3)
    return started


def _ratios(reference: Row, other: Row) -> dict[str, float]:
    lower_is_better = ("first_token_ms", "token_ms_p50", "token_ms_p95", "load_ms", "file_bytes",
                       "peak_memory_bytes")  # fmt: skip
    return {key: getattr(reference, key) / getattr(other, key) for key in lower_is_better}


def _spreads(reference: list[_Round], other: list[_Round]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest ratio of a round."""
    return {key: (min(each), max(each)) for key, each in _by_round(reference, other).items()}


def _paired(reference: list[_Round], other: list[_Round]) -> dict[str, float | tuple[float, float]]:
    """Medians of the ratios within a round, and their spreads."""
    medians = {k: statistics.median(each) for k, each in _by_round(reference, other).items()}
    spreads = {f"{key}_spread": ends for key, ends in _spreads(reference, other).items()}
    return {**medians, **spreads}


def _by_round(reference: list[_Round], other: list[_Round]) -> dict[str, list[float]]:
    """The latencies' ratios in every round."""
    return {
        key: ratios([getattr(r, key) for r in reference], [getattr(r, key) for r in other])
        for key in ("first_token_ms", "token_ms_p50")
    }


def _row(
    measured: list[_Round], batch: int, folder: Path, peak_memory_bytes: int, load_ms: float
) -> Row:
    tokens = [t for r in measured for t in r.token_ms]
    return Row(
        first_token_ms=statistics.median(r.first_token_ms for r in measured),
        token_ms_p50=statistics.median(tokens),
        token_ms_p95=float(np.percentile(tokens, 95)),
        tokens_per_s=1e3 * batch / statistics.median(tokens),
        load_ms=load_ms,
        file_bytes=sum(f.stat().st_size for f in folder.glob("model.onnx*")),
        peak_memory_bytes=peak_memory_bytes,
    )
