"""Masked LoRA in torch and Triton."""

from atp_kernels.ops import backend_name, masked_lora_linear
from atp_kernels.prefix import Prefix, prefix_lora_linears

__all__ = ["Prefix", "backend_name", "masked_lora_linear", "prefix_lora_linears"]
