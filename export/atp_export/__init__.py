"""Narrow checkpoints and ONNX."""
