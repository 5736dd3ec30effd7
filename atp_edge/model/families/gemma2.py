"""Gemma 2: norms before and after, 1 + w; caps on scores and logits; every other layer slides."""

from typing import Any

from atp_edge.model.families.record import (
    SANDWICH,
    Family,
    Layout,
    Scales,
    said_biases,
    window_by_type,
)


def scales(config: Any) -> Scales:
    return Scales(
        embedding=config.hidden_size**0.5,
        attention=config.query_pre_attn_scalar**-0.5,
        attention_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
    )


FAMILY = Family(
    model_type="gemma2",
    layout=Layout(norms=SANDWICH, norm_offset=1.0),
    activation="hidden_activation",
    biased=said_biases,
    window=window_by_type,
    scales=scales,
    reads=(
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
    ),
    only={"use_bidirectional_attention": (None, False)},
)
