"""What the sections measure: the shapes of Llama 3 8B on a GPU, a toy's on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A decoder's shapes, and how much of it is measured.

    few_layers: of the sections that need no whole model. blocks: of a step, each of `block_tokens`.
    """

    device: str
    hidden: int
    channels: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    few_layers: int
    blocks: int
    block_tokens: int
    rank: int
    ranks: tuple[int, ...]
    kept: float
    rounds: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.blocks * self.block_tokens

    @property
    def toy(self) -> bool:
        return self.device == "cpu"

    def config(self, layers: int, *, vocabulary: int | None = None) -> LlamaConfig:
        """A Llama of these shapes, its head its own."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.channels,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=layers,
            vocab_size=vocabulary or self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            dtype="bfloat16",
            bos_token_id=1,
            eos_token_id=2,
        )


REAL = Sizes(
    device="cuda", hidden=4096, channels=14336, heads=32, kv_heads=8, vocabulary=128_256,
    layers=32, few_layers=4, blocks=8, block_tokens=512, rank=16, ranks=(16, 64), kept=0.6,
    rounds=5, dtype=torch.bfloat16,
)  # fmt: skip
TOY = Sizes(
    device="cpu", hidden=64, channels=128, heads=4, kv_heads=2, vocabulary=256,
    layers=2, few_layers=2, blocks=2, block_tokens=16, rank=4, ranks=(4,), kept=0.6,
    rounds=1, dtype=torch.bfloat16,
)  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""


def sizes_for(*, toy: bool) -> Sizes:
    """Raises ValueError for real sizes where no GPU is."""
    if toy:
        return TOY
    if not torch.cuda.is_available():
        raise ValueError("no GPU is here: take --toy to run every section at toy size on the CPU")
    return REAL
