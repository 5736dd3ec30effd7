"""The fused operators in the training core, where the backend chosen is Triton.

q, k and v of a layer are one product that reads x once, and its MLP is one operator; o_proj is a
masked layer by itself. Everything keeps its full width and the masks stay on the device: nothing
is read back to the host, so that a step can be captured in a CUDA graph. (On the torch path
`skipping` makes shapes narrow instead, and has to know on the host how much is kept.)

What the operators do not cover is computed projection by projection, and said once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from atp_kernels import masked_qkv, masked_swiglu_mlp, on_triton
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from atp_edge.masking.caching import SharedInput, WeightCache
from atp_edge.masking.lora import MaskedLoraLinear, Placement
from atp_edge.model.families import MLP_PROJECTIONS, LayerShape, Projection
from atp_edge.model.sharded import here_for_a_while

logger = logging.getLogger(__name__)
QKV: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj")


class FusedQkv:
    """q, k and v of one layer under a decision: one product, whatever the mask."""

    def __init__(
        self,
        mask: Tensor | None,
        placement: Placement,
        projections: Mapping[Projection, MaskedLoraLinear],
        shape: LayerShape,
        before: object = None,
    ) -> None:
        """mask: [kv heads] that stands on the outputs, or None.

        before: the layer's site under the last decision; the stacked weights are taken over.
        """
        self.mask, self.placement, self.shape = mask, placement, shape
        self.modules = [projections[name] for name in QKV]
        weights = [module.get_base_layer().weight for module in self.modules]
        self.stacked: WeightCache = (
            before.stacked
            if isinstance(before, FusedQkv)
            else WeightCache(keeps=not any(map(here_for_a_while, weights)))
        )
        self._once = SharedInput()

    def compute(self, name: str, x: Tensor) -> Tensor:
        """One projection's output [..., out_features], at full width."""
        return self._once.take(name, x, self._together)

    def _together(self, x: Tensor) -> dict[str, Tensor]:
        parts = [module.parts() for module in self.modules]
        biases = [part.bias for part in parts if part.bias is not None]
        q, k, v = ((part.lora_a, part.lora_b) for part in parts)
        outputs = masked_qkv(
            x,
            self.stacked.of("weight", [part.weight for part in parts], torch.cat),
            (q, k, v),
            self.mask,
            group_heads=self.shape.group_heads,
            head_dim=self.shape.head_dim,
            bias=torch.cat(biases) if biases else None,
            scaling=self.modules[0].scaling["default"],
            placement=self.placement,
        )
        return dict(zip(map(str, QKV), outputs, strict=True))


def qkv_unlike(projections: Mapping[Projection, MaskedLoraLinear]) -> str | None:
    """Why q, k and v cannot be one product; None: they can."""
    modules = [projections[name] for name in QKV]
    if len({module.scaling["default"] for module in modules}) > 1:
        return "q, k and v differ in LoRA's scaling"
    if len({module.get_base_layer().bias is None for module in modules}) > 1:
        return "only some of q, k and v have a bias"
    return None


def fused_mlp(mlp: Any, x: Tensor) -> Tensor:
    """The forward of transformers' gated MLP; under a decision, through `masked_swiglu_mlp`.

    x [..., H] -> [..., H]. The decision is read off the projections: an MLP whose LoRA was merged
    or unloaded since, or that has no decision, is computed as transformers does.
    """
    gate, up, down = modules = [getattr(mlp, name) for name in MLP_PROJECTIONS]
    mask = getattr(down, "in_mask", None)
    if mask is None or not on_triton(x):
        return _own(mlp, x)
    reason = _mlp_unlike(mlp, modules)
    if reason is not None:
        log_fallback_once("the MLP", reason)
        return _own(mlp, x)
    return masked_swiglu_mlp(
        x,
        gate.parts(),
        up.parts(),
        down.parts(),
        mask,
        scaling=down.scaling["default"],
        placement=down.placement,
    )


def _own(mlp: Any, x: Tensor) -> Tensor:
    computed: Tensor = type(mlp).forward(mlp, x)
    return computed


def _mlp_unlike(mlp: Any, modules: list[MaskedLoraLinear]) -> str | None:
    if not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    if not all(module.lora_alone for module in modules):
        return "its LoRA is merged, switched off or of another kind"
    if len({module.scaling["default"] for module in modules}) > 1:
        return "gate, up and down differ in LoRA's scaling"
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "hooks watch its projections (as where importance is measured)"
    return None


@cache
def log_fallback_once(what: str, reason: str) -> None:
    """Say, once a reason, that a block is not computed by its fused operator."""
    logger.warning("%s is computed projection by projection: %s", what, reason)
