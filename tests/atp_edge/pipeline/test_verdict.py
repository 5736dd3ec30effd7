"""The verdict: against the untouched model first, with its interval, and what was gained."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from atp_edge.pipeline.verdict import verdict_of

BLOCKS = 40


def trained(untouched: float, slim: float, spread: float = 0.05) -> dict[str, Any]:
    """Figures of a run whose blocks' losses differ by `spread` around the mean difference."""
    wave = [spread * (-1) ** i for i in range(BLOCKS)]
    return {
        "train": {
            "untuned_perplexity": untouched,
            "dense_tuned_perplexity": 14.0,
            "perplexity": slim,
            "block_losses": {
                "untuned": [3.0 + x for x in wave],
                "dense": [2.6] * BLOCKS,
                "slim": [3.0 + math.log(slim / untouched)] * BLOCKS,
            },
        }
    }


@pytest.mark.parametrize(
    ("slim", "tone", "said"),
    [
        (15.0, "good", "Better on its domain than the untouched model (perplexity 15.00"),
        (16.95, "unsure", "As good on its domain as the untouched model (perplexity 16.95"),
        (21.58, "bad", "WORSE on its domain than the untouched model (perplexity 21.58"),
    ],
)
def test_the_untouched_model_comes_first(slim: float, tone: str, said: str) -> None:
    found = verdict_of(trained(16.93, slim))
    assert found.findings[0].tone == tone
    assert found.sentence.startswith(said)
    assert bool(found.advice) == (tone == "bad")


def test_the_interval_is_of_what_both_models_answered() -> None:
    text = verdict_of(trained(16.93, 15.0)).findings[0].text
    ends = re.search(r"untouched 16\.93, (-\d+\.\d)% to (-\d+\.\d)%", text)
    assert ends is not None
    assert float(ends[1]) < 100 * (15.0 / 16.93 - 1) < float(ends[2]) < 0
    without = trained(16.93, 15.0)
    without["train"]["block_losses"]["untuned"] = None
    assert "% to" not in verdict_of(without).findings[0].text


def test_the_verdict_is_of_the_file_that_ships() -> None:
    rounded = trained(16.93, 16.0) | {"verify": {"providers": {}, "quality": {"ratio": 1.25}}}
    first, second, *_ = verdict_of(rounded).findings
    assert first.text.startswith("WORSE on its domain than the untouched model (perplexity 20.00")
    assert second.text.startswith("70.0% of the tuned dense model's perplexity recovered (")


def test_a_failed_proof_makes_it_bad_whatever_was_gained() -> None:
    metrics = trained(16.93, 12.0) | {
        "verify": {"providers": {"CPUExecutionProvider": {"passed": False}}},
        "bench": {"ratios": {"token_ms_p50": 1.4, "peak_memory_bytes": 1.3, "file_bytes": 0.8}},
    }
    found = verdict_of(metrics)
    assert found.tone == "bad"
    assert "NOT PROVEN equal to its PyTorch model on CPUExecutionProvider" in found.sentence
    assert "1.40x faster a token; 1.30x less memory; 1.25x larger" in found.sentence
    metrics["bench"]["ratios"] = {
        "token_ms_p50": 0.998, "peak_memory_bytes": 1.002, "file_bytes": 1.0,
    }  # fmt: skip
    assert verdict_of(metrics).sentence.endswith("as fast a token; as much memory; as large.")


def test_a_run_without_figures_says_nothing() -> None:
    assert verdict_of({}).sentence == ""
