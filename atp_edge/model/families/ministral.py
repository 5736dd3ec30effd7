"""Ministral 8B: Mistral with a type a layer."""

from atp_edge.model.families.record import Family, window_by_type

FAMILY = Family(
    model_type="ministral", window=window_by_type, reads=("layer_types", "sliding_window")
)
