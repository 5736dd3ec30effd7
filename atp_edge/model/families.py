"""Where each model family keeps its heads and channels.

Every supported family is a pre-norm decoder with `model.layers[i].self_attn.{q,k,v,o}_proj` and
`model.layers[i].mlp.{gate,up,down}_proj`; they differ in biases and in q/k norms. Widths of single
layers are read from transformers' own `per_layer_config` (PreTrainedConfig, transformers >= 5.20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS: tuple[Projection, ...] = ATTENTION_PROJECTIONS + MLP_PROJECTIONS
PROJECTIONS_OF: dict[str, tuple[Projection, ...]] = {
    "attention": ATTENTION_PROJECTIONS,
    "mlp": MLP_PROJECTIONS,
}
READER_OF: dict[str, Projection] = {"attention": "o_proj", "mlp": "down_proj"}
"""The projection that reads a site's structures, by the site's kind; the others write them."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one decoder layer."""

    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    sliding_window: int | None = None
    rope_pairs: tuple[int, ...] | None = None
    """The dense head's RoPE pairs that `head_dim` holds, ascending; None: every one."""

    @property
    def group_heads(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All that the sizes, the costs and the graph of a decoder follow from, besides its weights."""

    family: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[LayerShape, ...]
    biased: frozenset[str]
    """Names of the projections that carry a bias."""
    qk_norm: bool
    norm_eps: float


def module_path(layer: int, projection: str) -> str:
    """Dotted path of a projection below the causal language model."""
    block = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def _biased(config: Any) -> frozenset[str]:
    match config.model_type:
        case "llama":
            attention = ATTENTION_PROJECTIONS if config.attention_bias else ()
            return frozenset(attention) | frozenset(MLP_PROJECTIONS if config.mlp_bias else ())
        case "qwen2":
            return frozenset({"q_proj", "k_proj", "v_proj"})
        case "qwen3":
            return frozenset(ATTENTION_PROJECTIONS if config.attention_bias else ())
        case _:
            return frozenset()


FAMILIES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "swish")
"""transformers' names of x * sigmoid(x)."""


def _layer_shape(config: Any, layer: int) -> LayerShape:
    heads = config.num_attention_heads
    if heads < 1 or config.num_key_value_heads < 1 or heads % config.num_key_value_heads:
        raise ValueError(
            f"layer {layer} has {heads} query heads for {config.num_key_value_heads} KV heads: "
            "expected a multiple; correct num_attention_heads or num_key_value_heads"
        )
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else True
    pairs = getattr(config, "rope_pairs", None)
    return LayerShape(
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        channels=config.intermediate_size,
        rope_pairs=None if pairs is None else tuple(pairs),
        sliding_window=getattr(config, "sliding_window", None) if slides else None,
    )


def model_shape(config: PretrainedConfig) -> ModelShape:
    """The sizes of a decoder, from its configuration alone.

    Raises ValueError for a family or an activation that is not known here, and for sizes that make
    no decoder.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}. Use a model of one of these families."
        )
    source: Any = config
    if source.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {source.hidden_act!r} is not supported; expected silu, which the kernels "
            "and the exported graph compute. Use a model with this activation."
        )
    count = source.num_hidden_layers
    layers = [source.per_layer_config[i] for i in range(count)] if source.is_heterogeneous else []
    return ModelShape(
        family=config.model_type,
        hidden=source.hidden_size,
        vocabulary=source.vocab_size,
        tied=bool(source.tie_word_embeddings),
        layers=tuple(_layer_shape(layers[i] if layers else source, i) for i in range(count)),
        biased=_biased(source),
        qk_norm=config.model_type == "qwen3",
        norm_eps=source.rms_norm_eps,
    )
