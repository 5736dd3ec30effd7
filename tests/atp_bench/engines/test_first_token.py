"""The first token: who runs when, and what is said of the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from atp_bench.engines import first_token
from atp_bench.engines.first_token import paired_first_tokens

NAMES = ("dense", "uniform", "per-layer")


def measured(
    monkeypatch: pytest.MonkeyPatch, times: Mapping[str, list[float]], rounds: int
) -> tuple[first_token.FirstTokens, list[list[str]]]:
    """The bench over given times, the first of each the warm-up's; and the order of every round."""
    orders: list[list[str]] = []
    left = {name: iter(values) for name, values in times.items()}

    def prefills(engines: Mapping[str, Any], *lengths: int) -> dict[str, Any]:
        assert lengths == (1, 512, 513)  # rows, prompt, capacity
        orders.append(list(engines))
        return {name: (None, next(left[name])) for name in engines}

    monkeypatch.setattr(first_token, "prefills", prefills)
    engines: dict[str, Any] = dict.fromkeys(times)
    pairs = [("dense", "uniform")]
    return paired_first_tokens(engines, pairs, prompt_tokens=512, rounds=rounds), orders


def test_every_model_takes_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    _, orders = measured(monkeypatch, {name: [1.0] * 4 for name in NAMES}, rounds=3)
    # The first is the warm-up.
    assert len(orders) == 4
    for place in range(3):
        assert {order[place] for order in orders[1:]} == set(NAMES)


def test_ratios_are_taken_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine for two of five rounds moves the medians in ms, and no ratio; one slow model
    in one round moves a quartile at most. The warm-up is not counted."""
    times = {
        "dense": [999.0, 150.0, 150.0, 300.0, 300.0, 150.0],
        "uniform": [1.0, 100.0, 100.0, 200.0, 200.0, 300.0],
    }
    found, _ = measured(monkeypatch, times, rounds=5)
    ratio = found.pairs["dense : uniform"]
    assert ratio.median == pytest.approx(1.5)
    assert ratio.quartiles == pytest.approx((1.5, 1.5))
    assert found.ms == {"dense": 150.0, "uniform": 200.0}
    assert found.rounds == 5


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds is 0: expected 1 or more"):
        paired_first_tokens({}, [], prompt_tokens=512, rounds=0)
