"""Gemma 3, the text model: Gemma 2's norms, norms of queries and keys, a RoPE a type of layer."""

from atp_edge.model.families.gemma2 import scales
from atp_edge.model.families.record import (
    SANDWICH,
    Family,
    HeadNorms,
    Layout,
    said_biases,
    window_by_type,
)

FAMILY = Family(
    model_type="gemma3_text",
    layout=Layout(norms=SANDWICH, norm_offset=1.0, head_norms=HeadNorms()),
    activation="hidden_activation",
    biased=said_biases,
    window=window_by_type,
    scales=scales,
    reads=(
        "attention_bias",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
    ),
    only={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
)
