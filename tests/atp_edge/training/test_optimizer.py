"""The learning rate's course."""

from __future__ import annotations

import pytest

from atp_edge.training.optimizer import rate_of_step


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [rate_of_step(i, steps=100, warmup=0.1, decay=True) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
