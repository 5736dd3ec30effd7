"""SmolLM2-135M's sizes through a dense LoRA step, on Triton's kernels and on torch's.

Measured by hand on an H200 before: 0.277 s against 0.231 s at 4,096 tokens, 0.298 against 0.259 at
32,768 (docs/kernels.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

from atp_bench.acceptance.backend import Choice, kernels_by, triton_absent
from atp_bench.acceptance.models import lora_on, random_blocks, random_llama
from atp_bench.acceptance.sizes import SMOLLM2, Sizes
from atp_bench.acceptance.timing import clocked_ms, free, host_costs
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.fused_layers import fuse_layers
from atp_edge.training.optimizer import lora_parameters

BEFORE_S = {4096: {"triton": 0.277, "torch": 0.231}, 32_768: {"triton": 0.298, "torch": 0.259}}
_TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Seconds of a step, optimizer included, by tokens and backend; `auto` is what runs unasked."""
    config = LlamaConfig(**SMOLLM2 | (_TOY if sizes.toy else {}))
    found: dict[str, Any] = {"steps": {}, "before_s": {} if sizes.toy else BEFORE_S}
    names: tuple[Choice, ...] = ("auto", "torch", "joined")
    if triton_absent(sizes.device) is None:
        names = (*names, "triton")
    for tokens in (sizes.tokens,) if sizes.toy else BEFORE_S:
        rows = found["steps"][str(tokens)] = {}
        for name in names:
            with kernels_by(name):
                rows[name] = _costs(_step(config, sizes, tokens), sizes)
            keep(found)
            free()
    return found


def _step(config: LlamaConfig, sizes: Sizes, tokens: int) -> Callable[[], None]:
    model = lora_on(random_llama(config, sizes.device, torch.float32), rank=16)
    set_decision(model, None, "whole")
    fuse_layers(model)
    count = tokens // sizes.block_tokens
    blocks = random_blocks(sizes, vocabulary=config.vocab_size, count=count)
    fused = sizes.device == "cuda"
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-4, fused=fused)

    def run() -> None:
        with torch.autocast(sizes.device, dtype=sizes.dtype):
            loss = language_loss(model, blocks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _costs(run: Callable[[], None], sizes: Sizes) -> dict[str, Any]:
    costs = host_costs(run, sizes.device)
    walls = [clocked_ms(run) for _ in range(max(2, sizes.rounds))]
    return costs | {"step_s": statistics.median(walls) / 1e3}
