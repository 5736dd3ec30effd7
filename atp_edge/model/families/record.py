"""What a family of decoders is: one record, from which sizes, masks, cuts and graphs follow.

Every family is a decoder of `model.embed_tokens`, `model.layers[i].self_attn` and `.mlp`,
`model.norm` and `lm_head`, with RMS norms, RoPE and a gated MLP. A record says where they differ.
The arithmetic is that of transformers' own classes; a configuration key that changes it and that
the record does not name is refused (`atp_edge.model.families.refusals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Projection = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj",
]  # fmt: skip
Part = Literal["q", "k", "v", "o", "gate", "up", "down"]
Activation = Literal["silu", "gelu_tanh"]

PARTS: dict[Projection, tuple[Part, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
}
"""What lies in a projection's rows (of o and down: in its columns), one after the other."""
ATTENTION_PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
FUSED_ATTENTION: tuple[Projection, ...] = ("qkv_proj", "o_proj")
FUSED_MLP: tuple[Projection, ...] = ("gate_up_proj", "down_proj")
READER_OF: dict[str, Projection] = {"attention": "o_proj", "mlp": "down_proj"}
"""The projection that reads a site's structures, by the site's kind; the others write them."""


@dataclass(frozen=True, kw_only=True)
class Norms:
    """A layer's RMS norms over the hidden size by their module's name; None: there is none.

    `after` norms what leaves the attention or the MLP, before it is added to the stream.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are there."""
        every = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in every if name is not None)


SANDWICH = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
AFTER_ALONE = Norms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True, kw_only=True)
class HeadNorms:
    """RMS norms of queries and keys: over each head, or over all heads of a layer together."""

    query: str = "q_norm"
    key: str = "k_norm"
    over: Literal["head", "all"] = "head"
    after_rope: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What all models of a family have alike."""

    attention: tuple[Projection, ...] = ATTENTION_PROJECTIONS
    mlp: tuple[Projection, ...] = MLP_PROJECTIONS
    norms: Norms = field(default_factory=Norms)
    norm_offset: float = 0.0
    """What a norm's weight is added to before it multiplies."""
    head_norms: HeadNorms | None = None
    interleaved: bool = False
    """RoPE turns neighbours (0, 1), (2, 3), ..., not the halves of a head against each other."""

    @property
    def norms_all_heads(self) -> bool:
        """Whether queries (and keys) are normed over all heads together."""
        return self.head_norms is not None and self.head_norms.over == "all"


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Numbers that values are multiplied by, and caps: x -> cap * tanh(x / cap)."""

    embedding: float = 1.0
    residual: float = 1.0
    """Of what an attention or MLP adds to the stream."""
    attention: float | None = None
    """Of scores; None: 1 / sqrt(head_dim)."""
    logits: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None


Biased = frozenset[Projection]


def no_biases(config: Any) -> Biased:
    return frozenset()


def said_biases(config: Any) -> Biased:
    """As `attention_bias` (q, k, v and o) and, where a family has it, `mlp_bias` say."""
    attention = ATTENTION_PROJECTIONS if config.attention_bias else ()
    return frozenset(attention) | frozenset(
        MLP_PROJECTIONS if getattr(config, "mlp_bias", False) else ()
    )


def no_window(config: Any, layer: int) -> int | None:
    return None


def window_by_type(config: Any, layer: int) -> int | None:
    """The sliding window of layers that `layer_types` says have one."""
    slides = config.layer_types[layer] == "sliding_attention"
    return config.sliding_window if slides else None


def every_layer(config: Any, layer: int) -> bool:
    return True


def plain_scales(config: Any) -> Scales:
    return Scales()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A record. Its functions take transformers' configuration, or the one of a layer.

    reads: configuration keys of its own, beside those that every decoder has. only: further keys,
    with the values under which the record is true.
    """

    model_type: str
    layout: Layout = field(default_factory=Layout)
    activation: str = "hidden_act"
    """The configuration's key of the activation."""
    biased: Callable[[Any], Biased] = no_biases
    window: Callable[[Any, int], int | None] = no_window
    """Tokens that a layer sees, itself among them; None: all before it."""
    turned: Callable[[Any, int], bool] = every_layer
    """Whether RoPE turns a layer's queries and keys."""
    partial_rope: bool = False
    """Whether `partial_rotary_factor` says how much of a head RoPE turns."""
    scales: Callable[[Any], Scales] = plain_scales
    reads: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
