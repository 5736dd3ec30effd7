"""Masked LoRA in torch and Triton."""

from atp_kernels.ops import backend_name, masked_lora_linear
from atp_kernels.prefix import prefix_lora_linear

__all__ = ["backend_name", "masked_lora_linear", "prefix_lora_linear"]
