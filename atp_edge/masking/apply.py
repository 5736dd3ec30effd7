"""The masked model: a dense decoder with peft's LoRA, whose projections carry a decision.

Two placements of the mask (ATP, arXiv 2412.14426, section 3.3):

- `whole`: the mask stands on the whole output of a structure. The masked model then equals the
  narrow one. Used in generator steps and in evaluation.
- `base` (LoRA-aware): only the frozen product is masked, y = (W x) * m + s B A x, so that the LoRA
  of removed structures still learns to take over, and the regularizer drives it to zero. Used in
  LoRA steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, get_args

import torch
from atp_kernels import on_triton
from peft import PeftModel
from torch import Tensor

from atp_edge.masking.compact_site import CompactSite
from atp_edge.masking.lora import MaskedLoraLinear, Placement, SiteForward, lora_layer
from atp_edge.masking.norms import norm_kept
from atp_edge.masking.triton_blocks import (
    QKV,
    FusedQkv,
    fused_mlp,
    log_fallback_once,
    qkv_unlike,
)
from atp_edge.model.families import (
    MLP_PROJECTIONS,
    READER_OF,
    LayerShape,
    Layout,
    Projection,
    model_shape,
    module_path,
)
from atp_edge.model.structures import Masks, SiteKind, spread, to_rows

Modules = Mapping[Projection, MaskedLoraLinear]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What stands on one projection under a decision: a site's forward, or masks, or neither."""

    site: SiteForward | None = None
    in_mask: Tensor | None = None
    out_mask: Tensor | None = None


def set_decision(
    model: PeftModel,
    masks: Iterable[Tensor] | None,
    placement: Placement,
    *,
    skip: bool = True,
) -> None:
    """Put a decision on the model: masks [size] a site in the order of `sites_of`, or none.

    A mask that requires gradients brings them back to the decision. A bool mask is fixed: what it
    removes is not computed, unless `skip` is off (then o_proj and down_proj see their whole input).
    Where the backend is Triton, blocks go through its fused operators
    (`atp_edge/masking/triton_blocks.py`) and nothing is read back to the host; on torch a fixed
    decision makes shapes narrow (`CompactSite`). Attention in `head-dims`, fused projections and
    attention with norms over all heads are masked in either case: neither knows them.
    """
    decision = None if masks is None else Masks(masks)
    base: Any = model.get_base_model()
    shape = model_shape(base.config)
    for i, layer in enumerate(shape.layers):
        for kind in get_args(SiteKind):
            modules = {name: lora_layer(model, i, name) for name in shape.projections(kind)}
            mask = None if decision is None else decision.of(i, kind)
            choice = _choose(mask, placement, modules, layer, shape.layout, skip=skip)
            _apply(modules, placement, choice)
        norms = shape.layout.head_norms
        if norms is not None and norms.over == "all":
            kept = None if decision is None else decision.of(i, "attention")
            norm_kept(base.model.layers[i].self_attn, norms, layer, kept)
        if _on_gpu(modules) and shape.layout.mlp == MLP_PROJECTIONS:
            block = base.get_submodule(module_path(i, "down_proj").rpartition(".")[0])
            block.forward = MethodType(fused_mlp, block)


def _apply(modules: Modules, placement: Placement, choices: Mapping[Projection, _Choice]) -> None:
    for name, module in modules.items():
        choice = choices[name]
        module.name, module.placement, module.site = name, placement, choice.site
        module.in_mask, module.out_mask = choice.in_mask, choice.out_mask


def _choose(
    mask: Tensor | None,
    placement: Placement,
    modules: Modules,
    layer: LayerShape,
    layout: Layout,
    *,
    skip: bool,
) -> dict[Projection, _Choice]:
    """What stands on every projection of one site; mask: [size], or none."""
    if mask is None:
        return {name: _Choice() for name in modules}
    on_gpu, fixed = _on_gpu(modules), mask.dtype == torch.bool
    pairs = "q_proj" in modules and modules["q_proj"].space == "head-dims"
    masked_alone = pairs or _masked_alone(modules, layout)
    # On the whole output, masking what o_proj and down_proj read is enough; but what is masked in
    # their writers too is skipped there.
    both = placement == "base" or (fixed and skip and (on_gpu or masked_alone))
    sites: Mapping[Projection, SiteForward] = {}
    if skip and not masked_alone and on_gpu:
        sites = _fused_sites(mask if both else None, placement, modules, layer)
    elif skip and not masked_alone:
        sites = _compact_sites(mask, placement, modules)
    # A pair that goes must leave the scores too: in q, where the mask's gradient then comes from an
    # unmasked k.
    written = {name for name in modules if both or (pairs and name == "q_proj")}
    return {
        name: _Choice(site=sites[name])
        if name in sites
        else _masked(mask, module, reads=name in READER_OF.values(), writes=name in written)
        for name, module in modules.items()
    }


def _masked_alone(modules: Modules, layout: Layout) -> bool:
    """Whether neither fused operators nor narrow shapes know a site: its projections are fused, or
    its queries are normed over all heads."""
    if "o_proj" in modules:
        return "qkv_proj" in modules or layout.norms_all_heads
    return "gate_up_proj" in modules


def _masked(mask: Tensor, module: MaskedLoraLinear, *, reads: bool, writes: bool) -> _Choice:
    """The mask on what a projection reads, or on what it writes."""
    if reads:
        return _Choice(in_mask=to_rows(mask, module.in_features, module.space))
    if writes:
        return _Choice(out_mask=spread(mask, module.rows or (module.out_features,), module.space))
    return _Choice()


def _on_gpu(modules: Modules) -> bool:
    """Read off the weights, for a step's inputs are not known yet."""
    return on_triton(next(iter(modules.values())).get_base_layer().weight)


def _compact_sites(
    mask: Tensor, placement: Placement, modules: Modules
) -> dict[Projection, SiteForward]:
    """The site as it is when its decision has not changed, or a new one; none: masks must do."""
    # Attention without a single head has no shape that transformers' code could view it in.
    if mask.dtype != torch.bool or ("o_proj" in modules and not mask.any()):
        return {}
    site = next(iter(modules.values())).site
    if not isinstance(site, CompactSite) or not site.same_as(mask, placement):
        site = CompactSite(mask, placement, {str(name): module for name, module in modules.items()})
    return dict.fromkeys(modules, site)


def _fused_sites(
    mask: Tensor | None, placement: Placement, modules: Modules, shape: LayerShape
) -> dict[Projection, SiteForward]:
    """q, k and v as one, with the mask that stands on their outputs; o_proj and the MLP's
    projections keep masks of their own, which `fused_mlp` reads."""
    if "q_proj" not in modules:
        return {}
    reason = qkv_unlike(modules)
    if reason is not None:
        log_fallback_once("q, k, v", reason)
        return {}
    site = FusedQkv(mask, placement, modules, shape, before=modules["q_proj"].site)
    return dict.fromkeys(QKV, site)
