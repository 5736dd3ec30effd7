"""Masked LoRA, its gradients and attention in training, in torch and Triton.

A file an operator. A kernel in Triton has a file of its own beside its operator's, `*_triton.py`,
which nothing else imports. What each means is in reference.py.
"""

from atp_kernels.attention import causal_attention
from atp_kernels.backend import backend_name, fuses, on_triton, products
from atp_kernels.compact_lora import prefix_lora_linears
from atp_kernels.joined_lora import JoinedWeights, joined_lora_linears
from atp_kernels.masked_lora import dense_weight, masked_lora_linear
from atp_kernels.mlp import masked_swiglu_mlp
from atp_kernels.norm import fused_norm
from atp_kernels.proximal import shrink_removed
from atp_kernels.qkv import masked_qkv
from atp_kernels.reference import LoraLayer, Placement
from atp_kernels.rope import rope_qkv
from atp_kernels.scored_mask import mask_scored
from atp_kernels.swiglu import masked_swiglu, plain_swiglu, swiglu_of_both

__all__ = [
    "JoinedWeights",
    "LoraLayer",
    "Placement",
    "backend_name",
    "causal_attention",
    "dense_weight",
    "fused_norm",
    "fuses",
    "joined_lora_linears",
    "mask_scored",
    "masked_lora_linear",
    "masked_qkv",
    "masked_swiglu",
    "masked_swiglu_mlp",
    "on_triton",
    "plain_swiglu",
    "prefix_lora_linears",
    "products",
    "rope_qkv",
    "shrink_removed",
    "swiglu_of_both",
]
