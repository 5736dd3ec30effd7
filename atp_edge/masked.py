"""The masked model: a dense decoder with peft's LoRA, whose projections carry a decision.

Two placements of the mask (ATP, arXiv 2412.14426, section 3.3):

- `whole`: the mask stands on the whole output of a structure. The masked model then equals the
  narrow one. Used in generator steps and in evaluation.
- `base` (LoRA-aware): only the frozen product is masked, y = (W x) * m + s B A x, so that the LoRA
  of removed structures still learns to take over, and the regularizer drives it to zero. Used in
  LoRA steps.
"""

from __future__ import annotations

from types import MethodType

import torch
from atp_kernels import on_triton
from peft import PeftModel
from torch import Tensor

from atp_edge.families import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    READS,
    LayerShape,
    Projection,
    model_shape,
    module_path,
)
from atp_edge.fused import QKV, FusedQkv, fused_mlp, qkv_unlike, separately
from atp_edge.lora import MaskedLoraLinear, Placement, Site, lora_layer
from atp_edge.plan import Plan
from atp_edge.skipping import FixedSite
from atp_edge.structures import to_rows


def set_decision(
    model: PeftModel, masks: list[Tensor] | None, placement: Placement, *, skip: bool = True
) -> None:
    """Put a decision on the model: masks [size] a site in the order of `sites_of`, or none.

    A mask that requires gradients brings them back to the decision. A bool mask is fixed: what it
    removes is not computed, unless `skip` is off (then o_proj and down_proj see their whole input).
    Where the backend is Triton, blocks go through its fused operators (`atp_edge/fused.py`) and
    nothing is read back to the host; on torch a fixed decision makes shapes narrow (`FixedSite`).
    Attention in `head-dims` is masked in either case: neither knows heads of fewer dimensions.
    """
    base = model.get_base_model()
    for i, layer in enumerate(model_shape(base.config).layers):
        attention, mlp = (None, None) if masks is None else (masks[2 * i], masks[2 * i + 1])
        for mask, names in ((attention, ATTENTION_PROJECTIONS), (mlp, MLP_PROJECTIONS)):
            modules = {name: lora_layer(model, i, name) for name in names}
            # Read off the weights, for a step's inputs are not known yet.
            on_gpu = on_triton(modules[names[0]].get_base_layer().weight)
            fixed = mask is not None and mask.dtype == torch.bool
            pairs = "q_proj" in modules and modules["q_proj"].space == "head-dims"
            # On the whole output, masking what o_proj and down_proj read is enough; but what is
            # masked in their writers too is skipped there.
            both = placement == "base" or (fixed and skip and (on_gpu or pairs))
            sites: dict[Projection, Site] = {}
            if skip and mask is not None and not pairs:
                sites = (
                    _fused_sites(mask if both else None, placement, modules, layer)
                    if on_gpu
                    else _fixed_sites(mask, placement, modules)
                )
            for name, module in modules.items():
                module.site, module.name, module.placement = sites.get(name), name, placement
                reads = name in READS.values()
                rows = None
                if mask is not None and module.site is None:
                    count = module.in_features if reads else module.out_features
                    rows = to_rows(mask, count, module.space)
                module.in_mask = rows if reads else None
                # A pair that goes must leave the scores too: in q, where the mask's gradient then
                # comes from an unmasked k.
                writes = both or (pairs and name == "q_proj")
                module.out_mask = rows if writes and not reads else None
            if on_gpu and "down_proj" in modules:
                block = base.get_submodule(module_path(i, "down_proj").rpartition(".")[0])
                block.forward = MethodType(fused_mlp, block)


def _fixed_sites(
    mask: Tensor, placement: Placement, modules: dict[Projection, MaskedLoraLinear]
) -> dict[Projection, Site]:
    """The site as it is when its decision has not changed, or a new one; none: masks must do."""
    # Attention without a single head has no shape that transformers' code could view it in.
    if mask.dtype != torch.bool or ("o_proj" in modules and not mask.any()):
        return {}
    site = next(iter(modules.values())).site
    if not isinstance(site, FixedSite) or not site.same_as(mask, placement):
        site = FixedSite(mask, placement, {str(name): module for name, module in modules.items()})
    return dict.fromkeys(modules, site)


def _fused_sites(
    mask: Tensor | None,
    placement: Placement,
    modules: dict[Projection, MaskedLoraLinear],
    shape: LayerShape,
) -> dict[Projection, Site]:
    """q, k and v as one, with the mask that stands on their outputs; o_proj and the MLP's
    projections keep masks of their own, which `fused_mlp` reads."""
    if "q_proj" not in modules:
        return {}
    reason = qkv_unlike(modules)
    if reason is not None:
        separately("q, k, v", reason)
        return {}
    site = FusedQkv(mask, placement, modules, shape, before=modules["q_proj"].site)
    return dict.fromkeys(QKV, site)


def plan_masks(plan: Plan) -> list[Tensor]:
    """Fixed masks (bool [size] a site) of a plan."""
    return [site.mask() for site in plan.sites]
