"""Llama 2 and 3, and what takes their form (SmolLM2, Yi, ...)."""

from atp_edge.model.families.record import Family, said_biases

FAMILY = Family(
    model_type="llama",
    biased=said_biases,
    reads=("attention_bias", "mlp_bias"),
)
