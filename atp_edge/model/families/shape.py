"""The sizes of a decoder and the arithmetic of its layers, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from atp_edge.model.families.record import (
    PARTS,
    Activation,
    Biased,
    Family,
    Layout,
    Part,
    Projection,
    Scales,
)
from atp_edge.model.families.refusals import family_of
from atp_edge.model.families.registry import FAMILIES

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' names of the activations that the graphs compute."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one decoder layer."""

    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    sliding_window: int | None = None
    rope: str | None = ""
    """The rotary table that turns queries and keys: "", or the type of layer that it is for where
    types have their own. None: nothing is turned."""
    rope_pairs: tuple[int, ...] | None = None
    """The dense head's RoPE pairs that `head_dim` holds, ascending; None: every one."""

    @property
    def group_heads(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def rows(self, part: Part) -> int:
        """Rows of a part of a projection (of o and down: columns) that belong to structures."""
        match part:
            case "q" | "o":
                return self.heads * self.head_dim
            case "k" | "v":
                return self.kv_heads * self.head_dim
        return self.channels


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All that the sizes, the costs and the graph of a decoder follow from, besides its weights."""

    family: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[LayerShape, ...]
    biased: Biased
    """Names of the projections that carry a bias."""
    norm_eps: float
    layout: Layout = field(default_factory=Layout)
    activation: Activation = "silu"
    scales: Scales = field(default_factory=Scales)
    rotary: int | None = None
    """Dimensions of a (dense) head that RoPE turns; None: all of the first layer's."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed."""
        return self.layout.head_norms is not None

    @property
    def rotary_pairs(self) -> int:
        """Columns of a rotary table."""
        return (self.rotary or self.layers[0].head_dim) // 2

    @property
    def ropes(self) -> tuple[str, ...]:
        """The names of the rotary tables that layers read."""
        return tuple(sorted({x.rope for x in self.layers if x.rope is not None}))

    def projections(self, kind: str) -> tuple[Projection, ...]:
        """Those of an attention or of an MLP; the last one reads what the others write."""
        return self.layout.attention if kind == "attention" else self.layout.mlp


def structured(layer: LayerShape, projection: Projection) -> tuple[int, ...]:
    """The rows (of o and down: columns) that belong to structures, of each part in its order."""
    return tuple(layer.rows(part) for part in PARTS[projection])


def module_path(layer: int, projection: str) -> str:
    """Dotted path of a projection below the causal language model."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else (
        "self_attn"
    )  # fmt: skip
    return f"model.layers.{layer}.{block}.{projection}"


def rope_settings(config: Any) -> dict[str, dict[str, Any]]:
    """transformers' `rope_parameters` by the name of the rotary table, "" where there is one."""
    found = getattr(config, "rope_parameters", None) or {}
    return {"": found} if "rope_type" in found else dict(found)


def longest_text(config: Any) -> int:
    """Tokens of a text that the model reads by one and the same arithmetic: its own context, or
    the length beyond which RoPE's angles (longrope) or the scores' scale (Llama 4's, as Ministral 3
    has it) become others.

    Of longrope and of a `dynamic` RoPE transformers takes the angles by the longest text of a
    batch: beyond this length, what is said of a text depends on what is read beside it.
    """
    longest: int = config.max_position_embeddings
    for rope in rope_settings(config).values():
        if rope and (rope["rope_type"] == "longrope" or rope.get("llama_4_scaling_beta")):
            longest = min(longest, rope["original_max_position_embeddings"])
    return longest


def tokens_read(tokens: int) -> int:
    """Of a text of so many tokens, scored or generated: the last is predicted, and not read."""
    return tokens - 1


def check_reads(longest: int | None, tokens: int, what: str, remedy: str) -> None:
    """Raises ValueError for a text of more tokens than a model reads: `longest_text`, or the
    context of what ships. None: nobody says."""
    if longest is not None and tokens > longest:
        raise ValueError(f"{what}: {tokens} tokens, and the model reads {longest}; {remedy}")


def _layer_shape(config: Any, layer: int, family: Family) -> LayerShape:
    heads = config.num_attention_heads
    if heads < 1 or config.num_key_value_heads < 1 or heads % config.num_key_value_heads:
        raise ValueError(
            f"layer {layer} has {heads} query heads for {config.num_key_value_heads} KV heads: "
            "expected a multiple; correct num_attention_heads or num_key_value_heads"
        )
    pairs = getattr(config, "rope_pairs", None)
    by_type = "" not in rope_settings(config)
    rope = config.layer_types[layer] if by_type else ""
    return LayerShape(
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        channels=config.intermediate_size,
        rope=rope if family.turned(config, layer) else None,
        rope_pairs=None if pairs is None else tuple(pairs),
        sliding_window=family.window(config, layer),
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary(config: Any, family: Family) -> int:
    share = 1.0
    if family.partial_rope:
        share = rope_settings(config)[""].get("partial_rotary_factor", 1.0)
    return int(_head_dim(config) * share)


def model_shape(config: PretrainedConfig) -> ModelShape:
    """The sizes of a decoder, from its configuration alone.

    Raises ValueError for a family, an activation or a configuration key that is not known here, and
    for sizes that make no decoder.
    """
    family = family_of(config)
    source: Any = config
    activation = getattr(source, family.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{family.activation} {activation!r} is not supported; expected silu or "
            "gelu_pytorch_tanh, which the exported graph computes. Use a model with one of these "
            "activations."
        )
    return _shape_of(source, family)


def scales_of(config: Any) -> Scales:
    """The factors and caps of a model alone: a step asks for them."""
    return FAMILIES[config.model_type].scales(config)


def said_shape(config: PretrainedConfig) -> ModelShape:
    """The same of a model whose configuration need not be one that is supported: a proof judges
    what the model computes, whatever the configuration says of it."""
    return _shape_of(config, FAMILIES[config.model_type])


def _shape_of(source: Any, family: Family) -> ModelShape:
    count = source.num_hidden_layers
    layers = [source.per_layer_config[i] for i in range(count)] if source.is_heterogeneous else []
    return ModelShape(
        family=source.model_type,
        hidden=source.hidden_size,
        vocabulary=source.vocab_size,
        tied=bool(source.tie_word_embeddings),
        layers=tuple(
            _layer_shape(layers[i] if layers else source, i, family) for i in range(count)
        ),
        biased=family.biased(source),
        norm_eps=source.rms_norm_eps,
        layout=family.layout,
        activation=ACTIVATIONS.get(getattr(source, family.activation), "silu"),
        scales=family.scales(source),
        rotary=_rotary(source, family),
    )
