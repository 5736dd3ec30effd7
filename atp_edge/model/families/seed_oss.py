"""Seed-OSS: Llama with a bias on q, k and v, and another on o."""

from typing import Any

from atp_edge.model.families.record import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    Biased,
    Family,
)


def _biased(config: Any) -> Biased:
    qkv = ATTENTION_PROJECTIONS[:3] if config.attention_bias else ()
    o = ATTENTION_PROJECTIONS[3:] if config.attention_out_bias else ()
    return frozenset(qkv) | frozenset(o) | frozenset(MLP_PROJECTIONS if config.mlp_bias else ())


FAMILY = Family(
    model_type="seed_oss",
    biased=_biased,
    reads=("attention_bias", "attention_out_bias", "mlp_bias"),
)
