"""What a run starts from, as its settings say."""

from __future__ import annotations

import pytest

from atp_edge.config import Config
from atp_edge.settings import with_values
from atp_edge.training.setup import feasible_of
from tests.tiny import tiny_model


def test_an_adapter_whose_ranks_follow_from_the_decision_has_no_size_before_it() -> None:
    values = {"export.keep_adapter": True, "recovery.adapter": "ranks", "budget": "bytes=400KB"}
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"take recovery\.adapter = 'lora', or another budget"):
        feasible_of(with_values(Config(), values), model.config)
    feasible_of(with_values(Config(), values | {"budget": "params=0.9"}), model.config)
