"""The attention to train with: on a CPU one that is faster than torch's."""

from __future__ import annotations

from typing import Any

from atp_kernels import causal_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atp_edge.model.attention import CAUSAL


def attention_implementation(device: str) -> str:
    """transformers' name of the attention to train with: on a CPU `causal_attention`'s."""
    if device != "cpu":
        return "sdpa"
    AttentionInterface.register(CAUSAL, _attention)
    AttentionMaskInterface.register(CAUSAL, sdpa_mask)
    return CAUSAL


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [B, H, T, D] -> [B, T, H, D].

    What is not plain causal attention (padding, a window, a cache, dropout) is torch's fused one.
    """
    if attention_mask is None and not dropout and query.shape[2] == key.shape[2] > 1:
        out = causal_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
