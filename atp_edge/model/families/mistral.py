"""Mistral: every layer has the same sliding window, or none."""

from typing import Any

from atp_edge.model.families.record import Family


def _window(config: Any, layer: int) -> int | None:
    return config.sliding_window


FAMILY = Family(model_type="mistral", window=_window, reads=("sliding_window",))
