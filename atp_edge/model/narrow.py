"""Attention and MLP blocks rewritten into physically narrower ones.

A plan keeps KV groups (or RoPE pairs) and channels. Group g of a layer owns rows of k_proj and
v_proj, the rows of its query heads in q_proj and the same columns of o_proj; pair p owns two rows
of every head in q, k and v, and two columns in o; channel c owns row c of gate_proj and up_proj and
column c of down_proj. Of fused projections every part loses its rows. Norms over head_dim (Qwen3)
are shared by all heads and stay; norms over all heads (OLMo 2) lose the rows of q and k.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from atp_kernels import dense_weight
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp_edge.model.families import (
    PARTS,
    READER_OF,
    LayerShape,
    ModelShape,
    Projection,
    model_shape,
    structured,
)
from atp_edge.model.modeling_per_layer import per_layer_class
from atp_edge.model.plan import Plan, narrow_shape
from atp_edge.model.sharded import fill_sharded, here_for_a_while, is_sharded
from atp_edge.model.sharded import whole as sharded_whole
from atp_edge.model.stream import fill, without_weights
from atp_edge.model.structures import spread


def kept_rows_and_columns(
    plan: Plan, layer: LayerShape, index: int, projection: Projection
) -> tuple[Tensor | None, Tensor | None]:
    """Output rows and input columns of a projection that stay (None: all of them)."""
    in_mlp = PARTS[projection][0] in ("gate", "up", "down")
    site = plan.site(index, "mlp" if in_mlp else "attention")
    kept = spread(site.mask(), structured(layer, projection), plan.space).nonzero().squeeze(1)
    return (None, kept) if projection in READER_OF.values() else (kept, None)


def _query_scale(plan: Plan, shape: ModelShape, index: int, projection: Projection) -> float:
    """What q_proj is multiplied by: attention divides by the root of head_dim, which is smaller."""
    site = plan.site(index, "attention")
    if plan.space == "groups" or projection != "q_proj" or shape.scales.attention is not None:
        return 1.0
    return math.sqrt(site.width / site.size)


def narrow_config(config: Any, plan: Plan) -> Any:
    """The configuration of the narrow model: plain when uniform, else with `per_layer_config`.

    `head_dim` is written out: hidden_size / num_attention_heads no longer gives it. Where pairs are
    cut it stays the dense one, from which RoPE's frequencies follow, and every layer has its own.
    """
    dense = model_shape(config)
    shape = narrow_shape(dense, plan)
    slim = copy.deepcopy(config)
    slim.head_dim = dense.layers[0].head_dim
    widths: list[dict[str, Any]] = [
        {
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "intermediate_size": layer.channels,
        }
        for layer in shape.layers
    ]
    cut_heads = any(layer.rope_pairs is not None for layer in shape.layers)
    if cut_heads:
        for width, layer in zip(widths, shape.layers, strict=True):
            width |= {"head_dim": layer.head_dim, "rope_pairs": layer.rope_pairs}
    plain = copy.deepcopy(slim)
    for key, value in widths[0].items():
        setattr(plain, key, value)
    if plan.uniform and not cut_heads and _loads(plain):
        return plain
    slim.per_layer_config = dict(enumerate(widths))
    # Every layer states all its widths: readers need no knowledge of the dense model's.
    slim.serialize_explicit_per_layer_config = True
    # Llama's own validation reads the global head count (the dense one) and would raise.
    slim.allow_global_per_layer_attribute_access = True
    return slim


def _loads(config: Any) -> bool:
    """Whether transformers takes an ordinary configuration of these widths: some families' checks
    want hidden_size to be a multiple of the heads, or hold hidden_size / heads for head_dim."""
    try:
        config.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def narrow_state(state: dict[str, Tensor], shape: ModelShape, plan: Plan) -> dict[str, Tensor]:
    """Slice the weights, biases and LoRA factors of a state dict, whatever prefix its keys have.

    lora_A is [r, in] and loses columns, lora_B is [out, r] and loses rows, weights lose either.
    """
    return {key: _narrow_tensor(key, value, shape, plan) for key, value in state.items()}


def _narrow_tensor(key: str, value: Tensor, shape: ModelShape, plan: Plan) -> Tensor:
    parts = key.split(".")
    projection = _projection(parts, shape)
    if projection is None:
        return value
    index = int(parts[parts.index("layers") + 1])
    rows, columns = kept_rows_and_columns(plan, shape.layers[index], index, projection)
    if rows is not None and "lora_A" not in parts:
        kept = value.index_select(0, rows.to(value.device))
        scale = _query_scale(plan, shape, index, projection)
        return kept if scale == 1.0 else kept * scale  # no second copy of every matrix
    # A bias belongs to the rows; lora_B of o_proj and down_proj too.
    if columns is not None and value.ndim == 2 and "lora_B" not in parts:
        return value.index_select(1, columns.to(value.device))
    return value


def _projection(parts: list[str], shape: ModelShape) -> Projection | None:
    """The projection whose structures a tensor of this name (split at its dots) belongs to."""
    found = next((name for name in PARTS if name in parts), None)
    norms = shape.layout.head_norms
    if norms is not None and norms.over == "all":
        of_rows: dict[str, Projection] = {norms.query: "q_proj", norms.key: "k_proj"}
        found = found or next((of for name, of in of_rows.items() if name in parts), None)
    return found


def widen_lora(state: dict[str, Tensor], shape: ModelShape, plan: Plan) -> dict[str, Tensor]:
    """The LoRA factors of a narrow model at the dense model's sizes, zero where it was cut."""
    return {key: _widen_tensor(key, value, shape, plan) for key, value in state.items()}


def _widen_tensor(key: str, value: Tensor, shape: ModelShape, plan: Plan) -> Tensor:
    parts = key.split(".")
    projection = _projection(parts, shape)
    assert projection is not None, f"{key} is no factor of a projection"
    index = int(parts[parts.index("layers") + 1])
    layer = shape.layers[index]
    rows, columns = kept_rows_and_columns(plan, layer, index, projection)
    full = sum(structured(layer, projection))
    if rows is not None and "lora_B" in parts:
        value = value / _query_scale(plan, shape, index, projection)
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
        made: PreTrainedModel = per_layer_class(config.model_type)._from_config(config, dtype=dtype)
        return made
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def narrow_peft(model: PeftModel, plan: Plan, *, take: bool = False) -> PeftModel:
    """A narrow copy of a dense model with its LoRA, the factors sliced like the weights.

    take: what was cut is let go as it is cut, so that both are never held whole; the dense model is
    of no use after it. Of a model that is shared out over ranks the narrow one is, too.
    """
    dense = model.get_base_model()
    shape, config = model_shape(dense.config), narrow_config(dense.config, plan)
    with without_weights():
        base = build_model(config, dense.dtype)
        slim = get_peft_model(base, model.peft_config["default"])
    slim.get_base_model().tie_weights()
    whole = dict(model.named_parameters())

    def cut(name: str) -> Tensor:
        dense_one = whole.pop(name)
        if here_for_a_while(dense_one):
            return _narrow_tensor(name, sharded_whole(dense_one.detach()), shape, plan)
        # A 4-bit weight that is detached has lost what its levels stand for.
        value = _narrow_tensor(name, dense_weight(dense_one).detach(), shape, plan)
        shared = value.untyped_storage().data_ptr() == dense_one.untyped_storage().data_ptr()
        if take:
            dense_one.data = dense_one.data.new_empty(0)
        return value.clone() if shared and not take else value

    filled = fill_sharded if is_sharded(model) else fill
    filled(slim, [name for name, _ in slim.named_parameters()], cut)
    slim.get_base_model().tie_weights()
    return slim.to(dense.device).eval()


def merge(model: PeftModel, *, take: bool = False) -> PreTrainedModel:
    """The LoRA folded into fp32 weights; ValueError when a merged weight is not finite. take: in
    the model itself, which is of no use after it."""
    own = model if take else copy.deepcopy(model)
    merged: PreTrainedModel = own.float().merge_and_unload(safe_merge=True)
    return merged
