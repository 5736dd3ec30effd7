"""What is said of settings that leave a part of training out."""

from __future__ import annotations

import pytest

from atp_edge.config import Config
from atp_edge.pipeline.train import left_out
from atp_edge.settings import with_values


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.0, ["decision.control_share = 0: the decision is frozen at its start"]),
        (0.4, []),
        (1.0, ["decision.control_share = 1: no step is left for recovery"]),
    ],
)
def test_a_freeze_at_either_end_is_said(share: float, said: list[str]) -> None:
    config = with_values(Config(), {"decision.control_share": share, "steps": 10})
    assert left_out(config) == said
    frozen = with_values(config, {"decision.learn": False})
    assert left_out(frozen) == (said if share else [])
