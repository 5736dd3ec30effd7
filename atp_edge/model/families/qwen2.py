"""Qwen2 and Qwen2.5: biases on q, k and v."""

from typing import Any

from atp_edge.model.families.record import Biased, Family, window_by_type


def _biased(config: Any) -> Biased:
    return frozenset({"q_proj", "k_proj", "v_proj"})


FAMILY = Family(
    model_type="qwen2",
    biased=_biased,
    window=window_by_type,
    reads=("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
)
