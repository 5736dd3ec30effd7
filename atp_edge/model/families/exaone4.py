"""EXAONE 4: norms after alone, norms of queries and keys; of mixed layers those that slide turn."""

from typing import Any

from atp_edge.model.families.record import (
    AFTER_ALONE,
    Family,
    HeadNorms,
    Layout,
    window_by_type,
)


def _turned(config: Any, layer: int) -> bool:
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


FAMILY = Family(
    model_type="exaone4",
    layout=Layout(norms=AFTER_ALONE, head_norms=HeadNorms()),
    window=window_by_type,
    turned=_turned,
    reads=("layer_types", "sliding_window", "sliding_window_pattern"),
)
