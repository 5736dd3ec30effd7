"""Decoder layers whose elementwise parts are fused, where Triton's kernels run.

A layer adds the residual, norms it and writes x where the products read it, with x A^T beside it
under a joined decision; q, k, v come out of their one product turned by RoPE; SwiGLU writes what
down_proj reads. Values and gradients are transformers' own. What does not fit (another layout, a
norm that is trained, a cache) is computed by transformers' own forward, layer by layer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from atp_kernels import (
    backend_name,
    fused_norm,
    fuses,
    masked_swiglu,
    plain_swiglu,
    rope_qkv,
    swiglu_of_both,
)
from atp_kernels.autocast import compute_type
from peft import PeftModel
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_edge.masking.joined_site import JoinedSite
from atp_edge.masking.lora import MaskedLoraLinear
from atp_edge.model.families import MLP_PROJECTIONS, ModelShape, Norms, model_shape

# Their layers, and the attention of the first three, are Llama's.
_LAYERS = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = ("llama", "mistral", "qwen2")


def fuse_layers(model: nn.Module) -> None:
    """Let a decoder's layers run fused where its inputs are on a device that can."""
    if backend_name() == "torch":
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    shape = model_shape(base.config)
    if not _known(shape):
        return
    for layer in base.model.layers:
        layer.forward = MethodType(_layer, layer)
        layer.mlp.forward = MethodType(_mlp, layer.mlp)
        if shape.family in _ATTENTION:
            layer.self_attn.forward = MethodType(_attention, layer.self_attn)


def _known(shape: ModelShape) -> bool:
    return (
        shape.family in _LAYERS
        and shape.layout.norms == Norms()
        and shape.layout.mlp == MLP_PROJECTIONS
    )


def _layer(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """hidden_states [B, T, H] -> [B, T, H], as transformers' LlamaDecoderLayer.forward."""
    norms = layer.input_layernorm, layer.post_attention_layernorm
    trained = any(norm.weight.requires_grad for norm in norms)
    if args or trained or not fuses(hidden_states) or kwargs.get("past_key_values") is not None:
        whole: Tensor = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return whole
    _, x = _normed(norms[0], hidden_states, None, getattr(layer.self_attn, "q_proj", None))
    delta, _ = layer.self_attn(hidden_states=x, **kwargs)
    stream, x = _normed(norms[1], hidden_states, delta, layer.mlp.gate_proj)
    added: Tensor = stream + layer.mlp(x)
    return added


def _normed(norm: Any, stream: Tensor, delta: Tensor | None, reader: Any) -> tuple[Tensor, Tensor]:
    """reader: a projection that reads x; its site says what stands beside x."""
    kind, site = compute_type(stream), _joined(reader)
    a, room = (None, 0) if site is None else site.room(site.writers, kind)
    return fused_norm(stream, delta, norm.weight, norm.variance_epsilon, kind=kind, a=a, room=room)


def _joined(module: Any) -> JoinedSite | None:
    """The joined site that computes a projection, if one does."""
    site = module.site if isinstance(module, MaskedLoraLinear) and module.lora_alone else None
    return site if isinstance(site, JoinedSite) else None


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """x [..., H] -> [..., H], as transformers' gated MLP."""
    gate, up, down = modules = [getattr(mlp, name) for name in MLP_PROJECTIONS]
    silu = isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
    if not silu or not fuses(x) or _watched(modules):
        computed: Tensor = type(mlp).forward(mlp, x)
        return computed
    sites = [_joined(module) for module in modules]
    if sites[0] is not None and all(site is sites[0] for site in sites):
        site = sites[0]
        a, room = site.room([site.reader], compute_type(x))
        narrow: Tensor = down(swiglu_of_both(site.written(x), a, room))
        return narrow
    e, u = gate(x), up(x)
    if isinstance(down, MaskedLoraLinear) and down.masks_input_alone:
        mask = down.in_mask
        assert mask is not None
        return down.unmasked(masked_swiglu(e, u, mask, score=down.score))
    plain: Tensor = down(plain_swiglu(e, u))
    return plain


def _watched(modules: list[Any]) -> bool:
    """Whether hooks watch an MLP's projections; those of `scored` need not see down_proj, where it
    scores what it reads itself."""
    down = modules[-1]
    left = modules[:-1] if getattr(down, "scores_itself", False) else modules
    return any(module._forward_hooks or module._forward_pre_hooks for module in left)


def _attention(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """hidden_states [B, T, H] -> [B, T, H], as transformers' LlamaAttention.forward."""
    interface = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if (
        position_embeddings is None
        or past_key_values is not None
        or interface is None
        or not fuses(hidden_states)
        or position_embeddings[0].shape[-1] != attention.head_dim
    ):
        own: tuple[Tensor, Any] = type(attention).forward(
            attention,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return own
    q, k, v = _turned(attention, hidden_states, *position_embeddings)
    out, weights = interface(
        attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, **kwargs
    )
    y: Tensor = attention.o_proj(out.flatten(2))
    return y, weights


def _turned(
    attention: Any, x: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, heads, T, D], k and v [B, groups, T, D]."""
    size, site = attention.head_dim, _joined(attention.q_proj)
    if site is not None:
        packed = site.written(x)
        groups = packed.shape[-1] // size // (attention.num_key_value_groups + 2)
        heads = groups * attention.num_key_value_groups
        return rope_qkv(packed, cosine, sine, heads=heads, groups=groups)
    turned = []
    for projection in (attention.q_proj, attention.k_proj):
        y = projection(x)
        turned.append(rope_qkv(y, cosine, sine, heads=y.shape[-1] // size, groups=0)[0])
    v = attention.v_proj(x).unflatten(-1, (-1, size)).transpose(1, 2)
    return turned[0], turned[1], v
