"""Faults of a whole export: a file of another model, which it takes for this one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

ModelFault = Callable[[Any], None]


def _layer(model: Any) -> Any:
    return model.model.layers[-1]


def _swap_rows(weight: torch.Tensor, size: int) -> None:
    first = weight[:size].clone()
    weight[:size] = weight[-size:]
    weight[-size:] = first


def _heads_swapped(projection: str) -> ModelFault:
    def fault(model: Any) -> None:
        attention = _layer(model).self_attn
        weight = getattr(attention, projection).weight
        _swap_rows(weight.T if projection == "o_proj" else weight, attention.head_dim)

    return fault


def _scaled(factor: float) -> ModelFault:
    return lambda model: model.model.norm.weight.mul_(factor)


def _channels_off_by_one(model: Any) -> None:
    weight = _layer(model).mlp.down_proj.weight
    weight.copy_(weight.roll(1, 1))


def _theta(factor: float) -> ModelFault:
    def fault(model: Any) -> None:
        model.config.rope_parameters["rope_theta"] *= factor

    return fault


def _epsilon(factor: float) -> ModelFault:
    def fault(model: Any) -> None:
        model.config.rms_norm_eps *= factor

    return fault


def _window(size: int) -> ModelFault:
    """In every layer that has one."""

    def fault(model: Any) -> None:
        if getattr(model.config, "sliding_window", None):
            model.config.sliding_window = size

    return fault


def _nan_in_the_vocabulary(model: Any) -> None:
    model.get_output_embeddings().weight[17, 0] = float("nan")


def _activation(name: str) -> ModelFault:
    def fault(model: Any) -> None:
        model.config.hidden_act = name

    return fault


IN_THE_FILE: dict[str, ModelFault] = {
    "first and last query head swapped in a layer": _heads_swapped("q_proj"),
    "first and last head of o_proj swapped in a layer": _heads_swapped("o_proj"),
    "first and last key head swapped in a layer": _heads_swapped("k_proj"),
    "rotary theta / 10": _theta(0.1),
    "norm epsilon x 10": _epsilon(10),
    "norm epsilon x 1000": _epsilon(1000),
    "MLP of a layer zeroed": lambda model: _layer(model).mlp.down_proj.weight.zero_(),
    "attention of a layer zeroed": lambda model: _layer(model).self_attn.o_proj.weight.zero_(),
    "channels of an MLP off by one": _channels_off_by_one,
    "logits x 1.05": _scaled(1.05),
    "logits x 2": _scaled(2.0),
    "a window of 4": _window(4),
    "NaN in a norm's weight": lambda m: _layer(m).input_layernorm.weight[:1].fill_(float("nan")),
    "NaN in one row of the vocabulary": _nan_in_the_vocabulary,
}
"""What the file has and the model has not."""

IN_THE_MODEL: dict[str, ModelFault] = {
    "GELU exported as SiLU": _activation("gelu_pytorch_tanh"),
    "ReLU exported as SiLU": _activation("relu"),
}
"""What the model has and the file has not."""


@torch.no_grad()
def changed(model: PreTrainedModel, fault: ModelFault) -> PreTrainedModel:
    """A copy with a fault, built anew, for what is said in its configuration."""
    damaged = copy.deepcopy(model)
    fault(damaged)
    rebuilt: Any = type(model)(damaged.config).eval()
    rebuilt.load_state_dict(damaged.state_dict())
    return rebuilt
