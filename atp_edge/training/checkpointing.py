"""Activation checkpointing: a layer keeps its input alone, and computes again in the backward pass.

transformers' own layers do it (`GradientCheckpointingLayer`), in training mode. Our models stay in
evaluation mode, so that nothing is ever dropped at random: the layers alone are switched, and for
one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel


def enable_checkpointing(model: PeftModel) -> None:
    """Let `checkpointed` forward passes of this model keep only what enters its layers."""
    base: Any = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def checkpointed(model: PeftModel) -> Iterator[None]:
    """The forward passes inside are checkpointed, where that was enabled."""
    layers: Any = [
        layer
        for layer in model.get_base_model().model.layers
        if getattr(layer, "gradient_checkpointing", False)
    ]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
