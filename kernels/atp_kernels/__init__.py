"""Masked LoRA in torch and Triton."""

from atp_kernels.attention import causal_attention
from atp_kernels.backend import backend_name, on_triton
from atp_kernels.compact_lora import prefix_lora_linears
from atp_kernels.ops import (
    dense_weight,
    masked_lora_linear,
    masked_qkv,
    masked_swiglu,
    masked_swiglu_mlp,
)
from atp_kernels.reference import LoraLayer

__all__ = [
    "LoraLayer",
    "backend_name",
    "causal_attention",
    "dense_weight",
    "masked_lora_linear",
    "masked_qkv",
    "masked_swiglu",
    "masked_swiglu_mlp",
    "on_triton",
    "prefix_lora_linears",
]
