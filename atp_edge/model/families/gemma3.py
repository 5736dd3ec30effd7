"""Gemma 3, the text model: Gemma 2's norms, norms of queries and keys, a RoPE a type of layer."""

from typing import Any

from atp_edge.model.families.record import (
    SANDWICH,
    Family,
    HeadNorms,
    Layout,
    Scales,
    said_biases,
    window_by_type,
)


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.hidden_size**0.5,
        attention=config.query_pre_attn_scalar**-0.5,
        logit_cap=config.final_logit_softcapping,
    )


FAMILY = Family(
    model_type="gemma3_text",
    layout=Layout(norms=SANDWICH, norm_offset=1.0, head_norms=HeadNorms()),
    activation="hidden_activation",
    biased=said_biases,
    window=window_by_type,
    scales=_scales,
    reads=(
        "attention_bias",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
    ),
    only={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
)
