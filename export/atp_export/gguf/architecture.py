"""What llama.cpp calls a decoder, and the sizes that it reads.

Uniform widths keep the family's own architecture. Widths that differ by layer go under `deci`
(Llama-Nemotron), the one architecture of plain Llama blocks whose head counts and MLP widths are
arrays (llama.cpp, src/llama-model.cpp, LLM_ARCH_DECI; tried with node-llama-cpp 3.22).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from atp_edge.model.families import ModelShape

FAMILY_ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PER_LAYER = "deci"
# RoPE on neighbouring values (0, 1), (2, 3), ...: rows of q and k are reordered for it. The others
# rotate halves of a head against each other, as transformers does.
PAIRED_ROPE = ("llama", PER_LAYER)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture's name, and whether its RoPE wants rows of q and k reordered."""

    name: str
    paired_rope: bool


ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def architecture_of(config: Any, shape: ModelShape, context: int) -> Architecture:
    """Raises ValueError for a model that llama.cpp has no architecture for."""
    if shape.family not in FAMILY_ARCHITECTURE:
        raise ValueError(
            f"model_type {shape.family!r} has no GGUF form here; expected one of "
            f"{', '.join(FAMILY_ARCHITECTURE)}; export it as ONNX"
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {kind!r} has no GGUF form here; expected {', '.join(ROPE_TYPES)}"
        )
    widths = {(x.heads, x.kv_heads, x.channels) for x in shape.layers}
    name = FAMILY_ARCHITECTURE[shape.family] if len(widths) == 1 else PER_LAYER
    if name == "qwen2" and shape.layers[0].heads * shape.layers[0].head_dim != shape.hidden:
        # llama.cpp's qwen2 wants square queries; its llama takes any, and biases too.
        name = "llama"
    if name == PER_LAYER and shape.qk_norm:
        raise ValueError(
            f"{shape.family} with widths that differ by layer: llama.cpp reads such widths under "
            "`deci` alone, which has no norms of queries and keys; train with --widths uniform"
        )
    if any(x.rope_pairs is not None for x in shape.layers):
        raise ValueError(
            "decision.space = 'head-dims' leaves heads that hold some of their RoPE pairs, which "
            "llama.cpp cannot rotate; train with --decision-space groups"
        )
    if any(not x.heads or not x.channels for x in shape.layers):
        raise ValueError("a layer has no attention or no MLP left, which GGUF has no place for")
    window = next((x.sliding_window for x in shape.layers if x.sliding_window), None)
    if window is not None and window < context:
        raise ValueError(
            f"a sliding window of {window} tokens: llama.cpp's {name!r} architecture attends to "
            f"everything; export with a context of {window} or less (--context)"
        )
    return Architecture(name=name, paired_rope=name in PAIRED_ROPE)


def write_sizes(
    writer: GGUFWriter, config: Any, shape: ModelShape, named: Architecture, context: int
) -> None:
    """The keys of an architecture: context, widths (arrays under `deci`), heads, norms, RoPE."""
    head_dim = shape.layers[0].head_dim

    def widths(values: list[int]) -> Any:
        return values if named.name == PER_LAYER else values[0]

    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(len(shape.layers))
    writer.add_feed_forward_length(widths([x.channels for x in shape.layers]))
    writer.add_head_count(widths([x.heads for x in shape.layers]))
    writer.add_head_count_kv(widths([x.kv_heads for x in shape.layers]))
    # Not hidden / heads any more once heads are cut.
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocabulary)
    _write_rope(writer, config.rope_parameters)


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    """llama3's scaling is a tensor of its own, `rope_freqs` (see tensors.py)."""
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(
            RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN
        )
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
