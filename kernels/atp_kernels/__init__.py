"""Masked LoRA in torch and Triton."""
