"""GLM-4: neighbours in half a head turn, norms before and after, gate and up in one matrix."""

from typing import Any

from atp_edge.model.families.record import (
    ATTENTION_PROJECTIONS,
    FUSED_MLP,
    Biased,
    Family,
    Layout,
    Norms,
)


def _biased(config: Any) -> Biased:
    return frozenset(ATTENTION_PROJECTIONS[:3] if config.attention_bias else ())


FAMILY = Family(
    model_type="glm4",
    layout=Layout(
        mlp=FUSED_MLP,
        norms=Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
        interleaved=True,
    ),
    biased=_biased,
    partial_rope=True,
    reads=("attention_bias",),
)
