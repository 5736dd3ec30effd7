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
from atp_kernels import backend_name, products
from atp_kernels.backend import MaskKind, Products
from peft import PeftModel
from torch import Tensor

from atp_edge.masking.compact_site import CompactSite
from atp_edge.masking.joined_site import JoinedSite, Standing, joined_sites
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
    ModelShape,
    Projection,
    model_shape,
    module_path,
)
from atp_edge.model.structures import Masks, SiteKind, site_index, spread, to_rows

Modules = Mapping[Projection, MaskedLoraLinear]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What stands on one projection under a decision: a site's forward, or masks, or neither."""

    site: SiteForward | None = None
    in_mask: Tensor | None = None
    out_mask: Tensor | None = None
    structure_mask: Tensor | None = None


def set_decision(
    model: PeftModel,
    masks: Iterable[Tensor] | None,
    placement: Placement,
    *,
    skip: bool = True,
    held: bool = False,
) -> None:
    """Put a decision on the model: masks [size] a site in the order of `sites_of`, or none.

    A mask that requires gradients brings them back to the decision. A bool mask is fixed: what it
    removes is not computed, unless `skip` is off (then o_proj and down_proj see their whole input).
    `atp_kernels.backend` says by which products. Joined ones (`JoinedSite`) and torch's
    (`CompactSite`) make shapes narrow; masked ones, of Triton, go through its fused operators
    (`atp_edge/masking/triton_blocks.py`). Attention in `head-dims`, fused projections and attention
    with norms over all heads are masked in either case: none of them knows those.

    held: this decision stands already and no LoRA of a removed structure has come to life since
    (`grown`), so that joined sites need not be looked at: nothing is read back to the host.
    """
    decision = None if masks is None else Masks(masks)
    base: Any = model.get_base_model()
    shape = model_shape(base.config)
    sites = _sites(model, shape)
    joined: Mapping[tuple[int, SiteKind], JoinedSite | None] = {}
    if decision is not None and skip:
        joined = _joined(decision, placement, sites, shape.layout, held=held)
    for (i, kind), modules in sites.items():
        mask = None if decision is None else decision.of(i, kind)
        site = joined.get((i, kind))
        choice = _choose(
            mask, placement, modules, shape.layers[i], shape.layout, skip=skip, joined=site
        )
        _apply(modules, placement, choice)
        for module in modules.values():
            module.rested = site or (None if mask is None else module.rested)
        if shape.layout.mlp == MLP_PROJECTIONS and kind == "mlp" and backend_name() == "triton":
            block = base.get_submodule(module_path(i, "down_proj").rpartition(".")[0])
            block.forward = MethodType(fused_mlp, block)
    norms = shape.layout.head_norms
    if norms is not None and norms.over == "all":
        for i, layer in enumerate(shape.layers):
            kept = None if decision is None else decision.of(i, "attention")
            norm_kept(base.model.layers[i].self_attn, norms, layer, kept)


def grown(model: PeftModel) -> Tensor | None:
    """Whether LoRA of a removed structure, dead when the decision was set, is dead no more: a bool
    on the device; None where no site would have to know."""
    sites = {id(m.site): m.site for m in model.modules() if isinstance(m, MaskedLoraLinear)}
    found = [site.grown() for site in sites.values() if isinstance(site, JoinedSite)]
    return torch.stack(found).any() if found else None


def slots_of(model: PeftModel) -> list[list[int]]:
    """Where joined sites hold which structures, site by site; empty where none is joined."""
    shape = model_shape(model.get_base_model().config)
    rested = [next(iter(m.values())).rested for m in _sites(model, shape).values()]
    if not any(isinstance(site, JoinedSite) for site in rested):
        return []
    return [site.slots if isinstance(site, JoinedSite) else [] for site in rested]


def restore_slots(
    model: PeftModel, masks: Masks, placement: Placement, slots: list[list[int]]
) -> None:
    """Put joined sites where they were (`slots_of`), under the decision that they stood under."""
    shape = model_shape(model.get_base_model().config)
    for (i, kind), modules in _sites(model, shape).items():
        mask, held = masks.of(i, kind), slots[site_index(i, kind)]
        if not held or _products(modules, mask) != "joined":
            continue
        named = {str(name): module for name, module in modules.items()}
        standing = Standing(mask=mask, placement=placement, projections=named)
        kept = mask.nonzero().flatten().tolist()
        for module in modules.values():
            module.rested = JoinedSite(standing, kept, held, before=None)


def _sites(model: PeftModel, shape: ModelShape) -> dict[tuple[int, SiteKind], Modules]:
    """The projections of every site, in the order of `sites_of`."""
    return {
        (i, kind): {name: lora_layer(model, i, name) for name in shape.projections(kind)}
        for i in range(len(shape.layers))
        for kind in get_args(SiteKind)
    }


def _joined(
    decision: Masks,
    placement: Placement,
    sites: Mapping[tuple[int, SiteKind], Modules],
    layout: Layout,
    *,
    held: bool,
) -> dict[tuple[int, SiteKind], JoinedSite | None]:
    """The sites that are computed by joined products."""
    taken = {
        (i, kind): Standing(
            mask=decision.of(i, kind),
            placement=placement,
            projections={str(name): module for name, module in modules.items()},
        )
        for (i, kind), modules in sites.items()
        if _products(modules, decision.of(i, kind)) == "joined"
        and not _masks_alone(modules, layout)
    }
    return dict(zip(taken, joined_sites(list(taken.values()), held=held), strict=True))


def _products(modules: Modules, mask: Tensor) -> Products:
    """Read off the weights, for a step's inputs are not known yet."""
    kind: MaskKind = "fixed" if mask.dtype == torch.bool else "numbers"
    return products(next(iter(modules.values())).get_base_layer().weight, kind)


def _apply(modules: Modules, placement: Placement, choices: Mapping[Projection, _Choice]) -> None:
    for name, module in modules.items():
        choice = choices[name]
        module.name, module.placement, module.site = name, placement, choice.site
        module.in_mask, module.out_mask = choice.in_mask, choice.out_mask
        module.structure_mask = choice.structure_mask


def _choose(
    mask: Tensor | None,
    placement: Placement,
    modules: Modules,
    layer: LayerShape,
    layout: Layout,
    *,
    skip: bool,
    joined: JoinedSite | None,
) -> dict[Projection, _Choice]:
    """What stands on every projection of one site; mask: [size], or none."""
    if mask is None:
        return {name: _Choice() for name in modules}
    fixed, how = mask.dtype == torch.bool, _products(modules, mask)
    alone = _masks_alone(modules, layout)
    # On the whole output, masking what o_proj and down_proj read is enough; but what is masked in
    # their writers too is skipped there.
    both = placement == "base" or (fixed and skip and (how == "masked" or alone))
    sites: Mapping[Projection, SiteForward] = {}
    if joined is not None:
        sites = dict.fromkeys(modules, joined)
    elif skip and not alone and how == "masked":
        sites = _fused_sites(mask if both else None, placement, modules, layer)
    elif skip and not alone and how == "plain":
        sites = _compact_sites(mask, placement, modules)
    # A pair that goes must leave the scores too: in q, where the mask's gradient then comes from an
    # unmasked k.
    written = {name for name in modules if both or (_pairs(modules) and name == "q_proj")}
    return {
        name: _Choice(site=sites[name])
        if name in sites
        else _masked(mask, module, reads=name in READER_OF.values(), writes=name in written)
        for name, module in modules.items()
    }


def _masks_alone(modules: Modules, layout: Layout) -> bool:
    """Whether neither fused operators nor narrow shapes know a site: its structures are pairs, its
    projections are fused, or its queries are normed over all heads."""
    return _pairs(modules) or _masked_alone(modules, layout)


def _pairs(modules: Modules) -> bool:
    return "q_proj" in modules and modules["q_proj"].space == "head-dims"


def _masked_alone(modules: Modules, layout: Layout) -> bool:
    """Whether neither fused operators nor narrow shapes know a site: its projections are fused, or
    its queries are normed over all heads."""
    if "o_proj" in modules:
        return "qkv_proj" in modules or layout.norms_all_heads
    return "gate_up_proj" in modules


def _masked(mask: Tensor, module: MaskedLoraLinear, *, reads: bool, writes: bool) -> _Choice:
    """The mask on what a projection reads, or on what it writes."""
    if reads:
        rows = to_rows(mask, module.in_features, module.space)
        return _Choice(in_mask=rows, structure_mask=mask if _side_by_side(module, mask) else None)
    if writes:
        return _Choice(out_mask=spread(mask, module.rows or (module.out_features,), module.space))
    return _Choice()


def _side_by_side(module: MaskedLoraLinear, mask: Tensor) -> bool:
    """Whether a structure's columns lie next to each other (those of a RoPE pair do not)."""
    return module.space == "groups" or len(mask) == module.in_features


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
