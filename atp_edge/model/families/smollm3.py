"""SmolLM3: RoPE turns no query of every fourth layer."""

from typing import Any

from atp_edge.model.families.record import Family, said_biases


def _window(config: Any, layer: int) -> int | None:
    slides = config.use_sliding_window and config.layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else None


def _turned(config: Any, layer: int) -> bool:
    return bool(config.no_rope_layers[layer])


FAMILY = Family(
    model_type="smollm3",
    biased=said_biases,
    window=_window,
    turned=_turned,
    reads=(
        "attention_bias",
        "layer_types",
        "mlp_bias",
        "no_rope_layer_interval",
        "no_rope_layers",
        "sliding_window",
        "use_sliding_window",
    ),
)
