"""Phi-3 and Phi-4-mini: q, k, v and gate, up in one matrix each; RoPE may turn a part of a head."""

from typing import Any

from atp_edge.model.families.record import FUSED_ATTENTION, FUSED_MLP, Family, Layout


def _window(config: Any, layer: int) -> int | None:
    return config.sliding_window


FAMILY = Family(
    model_type="phi3",
    layout=Layout(attention=FUSED_ATTENTION, mlp=FUSED_MLP),
    window=_window,
    partial_rope=True,
    reads=("sliding_window", "original_max_position_embeddings"),
)
