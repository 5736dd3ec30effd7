"""OLMo 3: OLMo 2 with sliding layers, and a RoPE a type of layer."""

from atp_edge.model.families.record import (
    AFTER_ALONE,
    Family,
    HeadNorms,
    Layout,
    said_biases,
    window_by_type,
)

FAMILY = Family(
    model_type="olmo3",
    layout=Layout(norms=AFTER_ALONE, head_norms=HeadNorms(over="all")),
    biased=said_biases,
    window=window_by_type,
    reads=("attention_bias", "layer_types", "sliding_window"),
)
