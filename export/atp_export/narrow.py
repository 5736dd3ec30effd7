"""Attention and MLP blocks rewritten into physically narrower ones.

A plan keeps KV groups and channels. Group g of a layer owns rows of k_proj and v_proj, the rows of
its query heads in q_proj and the same columns of o_proj; channel c owns row c of gate_proj and
up_proj and column c of down_proj. Norms over head_dim (Qwen3) are shared by all heads and stay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp_edge.families import LayerShape, ModelShape, model_shape
from atp_edge.modeling_per_layer import CLASSES
from atp_edge.plan import Plan, narrow_shape

GROUP_ROWS = ("q_proj", "k_proj", "v_proj")
CHANNEL_ROWS = ("gate_proj", "up_proj")


def _group_index(kept: tuple[int, ...], rows_per_group: int) -> Tensor:
    starts = torch.tensor(kept).unsqueeze(1) * rows_per_group
    return (starts + torch.arange(rows_per_group)).flatten()


def kept_rows_and_columns(
    plan: Plan, layer: LayerShape, index: int, projection: str
) -> tuple[Tensor | None, Tensor | None]:
    """Output rows and input columns of a projection that stay (None: all of them)."""
    if projection in CHANNEL_ROWS or projection == "down_proj":
        channels = torch.tensor(plan.site(index, "mlp").kept)
        return (channels, None) if projection in CHANNEL_ROWS else (None, channels)
    groups = plan.site(index, "attention").kept
    per_group = layer.head_dim * (1 if projection in ("k_proj", "v_proj") else layer.group_heads)
    rows = _group_index(groups, per_group)
    return (rows, None) if projection in GROUP_ROWS else (None, rows)


def narrow_config(config: Any, plan: Plan) -> Any:
    """The configuration of the narrow model: plain when uniform, else with `per_layer_config`.

    `head_dim` is written out: hidden_size / num_attention_heads no longer gives it.
    """
    dense = model_shape(config)
    shape = narrow_shape(dense, plan)
    slim = copy.deepcopy(config)
    slim.head_dim = dense.layers[0].head_dim
    widths = [
        {
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "intermediate_size": layer.channels,
        }
        for layer in shape.layers
    ]
    if plan.uniform:
        for key, value in widths[0].items():
            setattr(slim, key, value)
    else:
        slim.per_layer_config = dict(enumerate(widths))
        # Every layer states all its widths: readers need no knowledge of the dense model's.
        slim.serialize_explicit_per_layer_config = True
        # Llama's own validation reads the global head count (the dense one) and would raise.
        slim.allow_global_per_layer_attribute_access = True
    return slim


def narrow_state(state: dict[str, Tensor], shape: ModelShape, plan: Plan) -> dict[str, Tensor]:
    """Slice the weights, biases and LoRA factors of a state dict, whatever prefix its keys have.

    lora_A is [r, in] and loses columns, lora_B is [out, r] and loses rows, weights lose either.
    """
    return {key: _narrow_tensor(key, value, shape, plan) for key, value in state.items()}


def _narrow_tensor(key: str, value: Tensor, shape: ModelShape, plan: Plan) -> Tensor:
    parts = key.split(".")
    projection = next((p for p in parts if p.endswith("_proj")), None)
    if projection is None:
        return value
    index = int(parts[parts.index("layers") + 1])
    rows, columns = kept_rows_and_columns(plan, shape.layers[index], index, projection)
    if rows is not None and "lora_A" not in parts:
        return value.index_select(0, rows.to(value.device))
    # A bias belongs to the rows; lora_B of o_proj and down_proj too.
    if columns is not None and value.ndim == 2 and "lora_B" not in parts:
        return value.index_select(1, columns.to(value.device))
    return value


def widen_lora(state: dict[str, Tensor], shape: ModelShape, plan: Plan) -> dict[str, Tensor]:
    """The LoRA factors of a narrow model at the dense model's sizes, zero where it was cut."""
    return {key: _widen_tensor(key, value, shape, plan) for key, value in state.items()}


def _widen_tensor(key: str, value: Tensor, shape: ModelShape, plan: Plan) -> Tensor:
    parts = key.split(".")
    projection = next(p for p in parts if p.endswith("_proj"))
    index = int(parts[parts.index("layers") + 1])
    layer = shape.layers[index]
    rows, columns = kept_rows_and_columns(plan, layer, index, projection)
    full = {
        "q_proj": layer.heads * layer.head_dim,
        "k_proj": layer.kv_heads * layer.head_dim,
        "v_proj": layer.kv_heads * layer.head_dim,
        "o_proj": layer.heads * layer.head_dim,
    }.get(projection, layer.channels)
    if rows is not None and "lora_B" in parts:
        return value.new_zeros(full, value.shape[1]).index_copy_(0, rows, value)
    if columns is not None and "lora_A" in parts:
        return value.new_zeros(value.shape[0], full).index_copy_(1, columns, value)
    return value


def narrow_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A narrow copy of a dense causal language model: an ordinary one, or one of per-layer widths.

    An all-kept plan gives the same weights bit for bit.
    """
    config = narrow_config(model.config, plan)
    slim = build_model(config, model.dtype)
    slim.generation_config = copy.deepcopy(model.generation_config)
    state = narrow_state(model.state_dict(), model_shape(model.config), plan)
    slim.load_state_dict(state)
    return slim.to(model.device).eval()


def build_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """An untrained causal language model of this configuration, of either widths policy."""
    if config.is_heterogeneous:
        return CLASSES[type(config)]._from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def narrow_peft(model: PeftModel, plan: Plan) -> PeftModel:
    """A narrow copy of a dense model with its LoRA, the factors sliced like the weights."""
    dense = model.get_base_model()
    config = narrow_config(dense.config, plan)
    slim = get_peft_model(build_model(config, dense.dtype), model.peft_config["default"])
    slim.load_state_dict(narrow_state(model.state_dict(), model_shape(dense.config), plan))
    return slim.to(dense.device).eval()


def merge(model: PeftModel) -> PreTrainedModel:
    """The LoRA folded into fp32 weights; ValueError when a merged weight is not finite."""
    merged: PreTrainedModel = copy.deepcopy(model).float().merge_and_unload(safe_merge=True)
    return merged
