"""Hunyuan, dense: queries and keys are normed over each head after RoPE turned them."""

from atp_edge.model.families.record import Family, HeadNorms, Layout, said_biases

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    layout=Layout(
        head_norms=HeadNorms(query="query_layernorm", key="key_layernorm", after_rope=True)
    ),
    biased=said_biases,
    reads=("attention_bias",),
    only={"use_qk_norm": (True,)},
)
