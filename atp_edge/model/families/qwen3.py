"""Qwen3: queries and keys normed over each head."""

from atp_edge.model.families.record import Family, HeadNorms, Layout, said_biases, window_by_type

FAMILY = Family(
    model_type="qwen3",
    layout=Layout(head_norms=HeadNorms()),
    biased=said_biases,
    window=window_by_type,
    reads=(
        "attention_bias",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    ),
)
