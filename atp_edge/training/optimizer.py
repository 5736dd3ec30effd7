"""What a step tunes: LoRA, and the kept weights beside it, each at its peak rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from atp_edge.config import Config
from atp_edge.run import ranks
from atp_edge.training.captured import StepGraphs, step_graphs


def rate_of_step(done: int, *, steps: int, warmup: float, decay: bool) -> float:
    """A learning rate over its peak: linear warm-up, then constant, or a cosine down to a tenth."""
    rising = max(1, round(steps * warmup))
    if done < rising:
        return (done + 1) / rising
    if not decay:
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - rising) / (steps - rising)))


def lora_parameters(model: PeftModel) -> dict[str, Tensor]:
    """A and B of every projection, by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def kept_weights(model: PeftModel) -> dict[str, Tensor]:
    """The projections' own weights, by name."""
    return {n: p for n, p in model.named_parameters() if n.endswith("_proj.base_layer.weight")}


def _adam_in_8_bits(groups: list[dict[str, Any]], exact: Iterable[Tensor]) -> Any:
    """bitsandbytes' Adam, a byte a moment (arXiv 2110.02861); of `exact` in fp32."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    exact = list(exact)
    manager.register_parameters(exact)
    manager.override_config(exact, "optim_bits", 32)
    return AdamW8bit(groups, lr=0.0, weight_decay=0.0)


class TunedWeights:
    """LoRA and, with `retrain`, the projections' own weights; and their optimizer."""

    def __init__(
        self, model: PeftModel, config: Config, accelerator: Accelerator, *, retrain: bool
    ) -> None:
        self.accelerator, self.clip = accelerator, config.train.clip
        lora, weights = lora_parameters(model), kept_weights(model)
        for parameter in weights.values():
            parameter.requires_grad_(retrain)
        self.parameters = lora | (weights if retrain else {})
        groups = [{"params": list(lora.values()), "peak": config.lora.lr}]
        if retrain:
            groups.append({"params": list(weights.values()), "peak": config.recovery.retrain_lr})
        # Fused: 210 -> 63 ms for SmolLM2-135M's kept weights on one CPU core.
        made = (
            _adam_in_8_bits(groups, lora.values())
            if retrain and config.train.moments == "8bit"
            else torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        )
        self.optimizer = accelerator.prepare(made)

    def step(self, rate: float) -> None:
        """A step at this share of the peak rates, by the gradients of all ranks."""
        ranks.add_up(p.grad for p in self.parameters.values() if p.grad is not None)
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def graphs(self, stands_for: float) -> StepGraphs:
        """Graphs of the steps that tune these weights, where what they compute stands for so
        many."""
        accelerator = self.accelerator
        fp16 = accelerator.mixed_precision == "fp16"
        return step_graphs(
            self.parameters.values(), accelerator.device, stands_for=stands_for, fp16=fp16
        )

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(on)

    def state_dict(self) -> dict[str, Any]:
        return {"parameters": dict(self.parameters), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
