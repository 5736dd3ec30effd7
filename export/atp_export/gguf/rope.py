"""RoPE as llama.cpp reads it: a base, and where an architecture takes them, factors of frequencies.

It turns the pair i of a head by position * base^(-2i / d) / factor[i]. transformers' own angles,
scaling included, give the factors; a pair that is not turned has one beyond all positions. What
transformers multiplies cosines and sines by goes into the rows of queries and keys.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from atp_edge.model.checkpoint import build_on_meta
from atp_edge.model.families import ModelShape, rope_settings
from atp_export.gguf.architecture import Architecture

STILL = 1e30
"""A factor by which no position turns a pair."""
YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""What llama.cpp takes for what a yarn RoPE may say besides."""


@dataclass(frozen=True, kw_only=True)
class Angles:
    """factors: of every pair of a head [head_dim / 2]; None: all are 1. scale: of turned values."""

    factors: NDArray[np.float32] | None = None
    scale: float = 1.0


def angles_of(config: Any, shape: ModelShape, named: Architecture) -> Angles:
    """Of an architecture that takes factors, whose layers have one RoPE."""
    if not named.factors:
        return Angles()
    plain = copy.copy(config)
    plain.per_layer_config = None
    rotary_class: Any = type(build_on_meta(config).model.rotary_emb)
    rotary = rotary_class(config=plain)
    own = rotary.inv_freq.double().numpy()
    head_dim = shape.layers[0].head_dim
    base = rope_settings(config)[""]["rope_theta"]
    factors = np.full(head_dim // 2, STILL)
    factors[: len(own)] = base ** (-np.arange(len(own)) * 2 / head_dim) / own
    scale = float(rotary.attention_scaling)
    if np.allclose(factors, 1, rtol=1e-5):
        return Angles(scale=scale)
    return Angles(factors=factors.astype(np.float32), scale=scale)


def write_rope(writer: GGUFWriter, config: Any, shape: ModelShape, named: Architecture) -> None:
    """The keys. Raises ValueError for settings that an architecture takes otherwise."""
    settings = rope_settings(config)
    rope = settings.get("", settings.get("full_attention"))
    assert rope is not None
    writer.add_rope_dimension_count(
        shape.layers[0].head_dim if named.factors else 2 * shape.rotary_pairs
    )
    writer.add_rope_freq_base(_base(rope, shape.layers[0].head_dim))
    if named.factors:
        return
    if sliding := settings.get("sliding_attention"):
        _write_sliding(writer, rope, sliding, named)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        _write_yarn(writer, rope)


def _base(rope: dict[str, Any], head_dim: int) -> float:
    """Hunyuan's alpha is another base (transformers, modeling_hunyuan_v1_dense)."""
    base: float = rope["rope_theta"]
    if rope["rope_type"] == "dynamic":
        base *= rope["alpha"] ** (head_dim / (head_dim - 2))
    return base


def _write_sliding(
    writer: GGUFWriter, rope: dict[str, Any], sliding: dict[str, Any], named: Architecture
) -> None:
    """Layers that slide: `gemma3` has another base for them, `olmo2` the same, both no scaling."""
    if sliding["rope_type"] != "default":
        raise ValueError(
            f"rope_type {sliding['rope_type']!r} of layers that slide, which llama.cpp's "
            f"{named.name!r} has no place for"
        )
    if named.name == "gemma3":
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    elif sliding["rope_theta"] != rope["rope_theta"]:
        raise ValueError(
            f"a rope_theta of layers that slide, which llama.cpp's {named.name!r} has no place for"
        )


def _write_yarn(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    expected = YARN | {"attention_factor": 0.1 * np.log(rope["factor"]) + 1}
    for key, value in expected.items():
        said = rope.get(key)
        if said is not None and not (value is not None and np.isclose(said, value, rtol=1e-3)):
            raise ValueError(f"yarn with {key} {said}, which llama.cpp takes for {value}")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
