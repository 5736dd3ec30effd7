"""What the matrices of a checkpoint read on calibration text: the grams that GPTQ rounds by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atp_export.checkpoint import load_narrow

# One matrix of each that read the same input: q for q, k and v; gate for gate and up.
READERS = ("q_proj", "o_proj", "gate_proj", "down_proj")


@torch.no_grad()
def input_grams(checkpoint: Path, ids: Tensor) -> dict[str, Tensor]:
    """X^T X [in, in] over token blocks [N, T], by the name of the module that reads X, in fp32.

    All layers' grams are held at once, K^2 * 4 bytes each: 0.2 GB for a model of 135M parameters,
    more than the weights for the largest. Raises ValueError when there are no blocks.
    """
    if not len(ids):
        raise ValueError("there is no block to calibrate on: give longer documents or more of them")
    model = load_narrow(checkpoint)
    grams: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            gram = x.T @ x
            grams[name] = grams[name].add_(gram) if name in grams else gram

        return hook

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in READERS:
            module.register_forward_pre_hook(add(name))
    for block in ids:
        # The decoder without its vocabulary projection: no logits are wanted.
        model.model(input_ids=block[None], use_cache=False)
    return grams
