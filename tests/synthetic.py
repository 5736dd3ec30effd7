"""Checkpoints of random weights at real sizes, written one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from atp_edge.model.checkpoint import build_on_meta, write_checkpoint

LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""1.24 billion parameters."""
LLAMA_3B: dict[str, Any] = LLAMA_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
}
"""3.2 billion parameters."""


def synthetic_checkpoint(
    folder: Path,
    sizes: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard: str = "1GB",
) -> Path:
    """A Llama of these sizes in shards; norms are 1, all else is drawn with deviation 0.02."""
    draw = torch.Generator().manual_seed(0)
    model = build_on_meta(LlamaConfig(**sizes))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shapes[name])
        return torch.empty(shapes[name], dtype=dtype).normal_(0, 0.02, generator=draw)

    write_checkpoint(model, read, tokenizer, folder, dtype=dtype, max_shard=max_shard)
    return folder
