"""What is refused: models of no family here, and configurations that say more than a record knows.

A key that a record does not know could change the arithmetic without a word in a cut model or a
graph. So a key of transformers' class that no record names must have the class's own default, and
a key that this family does not read but another does must say nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from atp_edge.model.families.record import Family
from atp_edge.model.families.registry import FAMILIES

_EVERY = {
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "max_position_embeddings",
}  # fmt: skip
"""Keys that are read of every decoder."""
_NO_MATTER = {
    "initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id",
    "pad_token_id", "eod_token_id", "attention_dropout", "residual_dropout", "resid_pdrop",
    "embd_pdrop",
}  # fmt: skip
"""Keys that change nothing of what a model computes (dropout: it is never in training mode)."""
_FOREIGN = {
    "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale", "clip_qkv",
    "no_rope_layers", "query_pre_attn_scalar", "lm_head_bias", "use_bidirectional_attention",
    "rope_interleaved", "qk_layernorm", "use_qk_norm", "num_experts", "num_local_experts",
    "n_routed_experts", "sliding_window",
}  # fmt: skip
"""Keys by which some decoder computes otherwise. Where a family's class does not read one,
transformers passes it over in silence, whatever its checkpoint meant."""
_SAY_NOTHING = (None, False, 0, 1)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_EXPERTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
_RECURRENT = ("mamba", "ssm", "linear_attn", "linear_key", "linear_num", "conv_L", "lru_", "rwkv",
              "short_conv")  # fmt: skip


def family_of(config: Any) -> Family:
    """The record of a configuration's family.

    Raises ValueError for another family, and for a key that the record does not know.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported{_reason(config)}; expected one of "
            f"{', '.join(sorted(FAMILIES))}. Use a model of one of these families."
        )
    _check_keys(config, family)
    return family


def _reason(config: Any) -> str:
    """Why a family is none of ours, where that can be told."""
    said = config.to_dict()
    kinds = sorted(set(said.get("layer_types") or ()) - set(_LAYER_TYPES))
    recurrent = [key for key in (config.model_type, *said) if key.startswith(_RECURRENT)]
    if recurrent or any("attention" not in kind or "linear" in kind for kind in kinds):
        what = ", ".join(kinds) or recurrent[0]
        return (
            f": a hybrid, some of whose layers are no softmax attention ({what}); what has no KV "
            "heads can neither be cut nor be exported here"
        )
    experts = next((key for key in _EXPERTS if said.get(key)), None)
    if experts is not None:
        return (
            f": a mixture of experts ({experts} = {said[experts]}); channels of experts that "
            "tokens are routed to can neither be cut nor be exported here"
        )
    if "text_config" in said:
        return ": it reads more than text (it has a text_config); take its text model alone"
    if kinds:
        return f": layers of type {', '.join(kinds)} are not known here"
    return ""


def _check_keys(config: Any, family: Family) -> None:
    known = _EVERY | _NO_MATTER | {family.activation, *family.reads}
    own = {f.name: f for f in dataclasses.fields(config)}
    general = {f.name for f in dataclasses.fields(PretrainedConfig)}
    for key, values in family.only.items():
        found = getattr(config, key, values[0])
        if found not in values:
            raise ValueError(_says(config, key, found, f"expected {_either(values)}"))
    known |= set(family.only)
    for key in own.keys() - known - general:
        default = own[key].default
        if (found := getattr(config, key)) != default:
            raise ValueError(_says(config, key, found, f"expected {default!r}, its default"))
    for key in _FOREIGN - known - own.keys():
        found = getattr(config, key, None)
        far = key == "sliding_window" and (found or 0) >= config.max_position_embeddings
        if found not in _SAY_NOTHING and not far:
            reader = type(config).__name__.replace("Config", "ForCausalLM")
            raise ValueError(
                _says(config, key, found, f"transformers' {reader} does not read this key")
            )
    for kind in set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES):
        raise ValueError(_says(config, "layer_types", kind, f"expected {_either(_LAYER_TYPES)}"))


def _says(config: Any, key: str, value: Any, expected: str) -> str:
    return (
        f"{key} {value!r} of a {config.model_type} model is not known here; {expected}. Use a "
        f"model without it, or, if it was trained without it, remove {key}"
    )


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
