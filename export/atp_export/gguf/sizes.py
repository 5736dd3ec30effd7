"""The sizes and factors of a decoder, as the keys of its architecture."""

from __future__ import annotations

from typing import Any

from gguf import GGUFWriter

from atp_edge.model.families import ModelShape
from atp_export.gguf.architecture import PER_LAYER, Architecture
from atp_export.gguf.rope import write_rope


def write_sizes(
    writer: GGUFWriter, config: Any, shape: ModelShape, named: Architecture, context: int
) -> None:
    """Context, widths (arrays under `deci`), heads, norms, windows, factors, RoPE."""
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
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocabulary)
    _write_windows(writer, shape, named)
    _write_factors(writer, shape, named)
    write_rope(writer, config, shape, named)


def _write_windows(writer: GGUFWriter, shape: ModelShape, named: Architecture) -> None:
    windows = [x.sliding_window for x in shape.layers]
    if named.windows and any(windows):
        writer.add_sliding_window(next(window for window in windows if window))
        writer.add_sliding_window_pattern([window is not None for window in windows])


def _write_factors(writer: GGUFWriter, shape: ModelShape, named: Architecture) -> None:
    scales = shape.scales
    if named.name == "gemma2":
        writer.add_attn_logit_softcapping(scales.attention_cap)
        writer.add_final_logit_softcapping(scales.logit_cap)
    if named.name == "granite":
        writer.add_embedding_scale(scales.embedding)
        writer.add_residual_scale(scales.residual)
        writer.add_attention_scale(scales.attention)
        writer.add_logit_scale(1 / scales.logits)
