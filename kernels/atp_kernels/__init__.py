"""Masked LoRA, its gradients and attention in training, in torch and Triton.

A file an operator. A kernel in Triton has a file of its own beside its operator's, `*_triton.py`,
which nothing else imports. What each means is in reference.py.
"""

from atp_kernels.attention import causal_attention
from atp_kernels.backend import backend_name, on_triton
from atp_kernels.compact_lora import prefix_lora_linears
from atp_kernels.masked_lora import dense_weight, masked_lora_linear
from atp_kernels.mlp import masked_swiglu_mlp
from atp_kernels.qkv import masked_qkv
from atp_kernels.reference import LoraLayer, Placement
from atp_kernels.swiglu import masked_swiglu

__all__ = [
    "LoraLayer",
    "Placement",
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
