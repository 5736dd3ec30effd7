"""Granite 3 and 4 (dense): Llama with factors on embedding, residual, scores and logits."""

from typing import Any

from atp_edge.model.families.record import Family, Scales, said_biases


def _scales(config: Any) -> Scales:
    return Scales(
        embedding=config.embedding_multiplier,
        residual=config.residual_multiplier,
        attention=config.attention_multiplier,
        logits=1 / config.logits_scaling,
    )


FAMILY = Family(
    model_type="granite",
    biased=said_biases,
    scales=_scales,
    reads=(
        "attention_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "mlp_bias",
        "residual_multiplier",
    ),
)
