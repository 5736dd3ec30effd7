"""Ministral 3, the text model: beyond the length it was first trained on, scores grow (Llama 4)."""

from typing import Any

from atp_edge.model.families.record import Family


def _window(config: Any, layer: int) -> int | None:
    return config.sliding_window


FAMILY = Family(model_type="ministral3", window=_window, reads=("sliding_window",))
