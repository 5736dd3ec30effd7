"""A fixed decision at one site: which structures are computed at all.

While a decision stands, q, k, v (or gate, up) give only the live structures, kept ones first, and
o (or down) reads them so; transformers' own attention and MLP work on what they are given, so the
attention itself and the SwiGLU are as narrow as the products. Nothing is scattered to full width.

A removed structure is dead, and not computed, when nothing of it can reach the output and no
gradient can reach its LoRA:

- placement `whole`: always.
- placement `base`, MLP: its rows of B are zero in gate and up. Then silu(g) u is zero, and so are
  the gradients of those rows (d_gate carries the factor u, d_up the factor silu(g)) and of its
  column of A in down (the factor silu(g) u).
- placement `base`, attention: its rows of B in v and its columns of A in o are zero. Then neither
  values nor output nor their gradients exist; q and k have nothing to weigh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from atp_kernels import LoraLayer, dense_weight, prefix_lora_linears
from torch import Tensor

from atp_edge.families import READS

if TYPE_CHECKING:
    from atp_edge.masked import MaskedLoraLinear

Placement = Literal["base", "whole"]


@dataclass(frozen=True, kw_only=True)
class Live:
    """Indices of a projection's kept rows (or columns), and of the live ones, kept first.

    None for live: the kept ones alone. None for both: all are kept.
    """

    kept: Tensor | None
    live: Tensor | None


class FixedSite:
    """The projections of one site under a fixed decision, and what is gathered for them."""

    def __init__(
        self, mask: Tensor, placement: Placement, projections: dict[str, MaskedLoraLinear]
    ) -> None:
        """mask: bool [size]; projections: q, k, v, o or gate, up, down by name."""
        self.mask, self.placement, self.projections = mask, placement, projections
        self._mask_version = mask._version
        order = torch.argsort(~mask, stable=True)
        kept = int(mask.sum())
        self.kept, self.removed = order[:kept], order[kept:]
        self._watched = self._watch()
        self._versions: list[tuple[int, int]] = []
        self._live: dict[int, Live] = {}
        self._gathered: dict[str, tuple[Any, Tensor]] = {}
        # (x, what its other readers have yet to take)
        self._shared: tuple[Tensor, dict[str, Tensor]] | None = None

    def same_as(self, mask: Tensor, placement: Placement) -> bool:
        """Whether this is the decision already, so that what was gathered stands."""
        if placement != self.placement or self.mask._version != self._mask_version:
            return False
        return mask is self.mask or torch.equal(mask, self.mask)

    def compute(self, name: str, x: Tensor) -> Tensor:
        """One projection's output. The writers read one x: the first one asked computes them all,
        and the others take theirs."""
        if name in READS.values():
            return self._together([name], x)[0]
        if self._shared is None or self._shared[0] is not x or name not in self._shared[1]:
            names = [other for other in self.projections if other not in READS.values()]
            self._shared = x, dict(zip(names, self._together(names, x), strict=True))
        found = self._shared[1].pop(name)
        if not self._shared[1]:
            self._shared = None
        return found

    def _together(self, names: list[str], x: Tensor) -> list[Tensor]:
        scaling = self.projections[names[0]].scaling["default"]
        return prefix_lora_linears(x, [self._layer(name) for name in names], scaling=scaling)

    def _layer(self, name: str) -> LoraLayer:
        module = self.projections[name]
        base = module.get_base_layer()
        a, b, bias = module.lora_A["default"].weight, module.lora_B["default"].weight, base.bias
        reads = name in READS.values()
        found = self.live((a.shape[1] if reads else len(b)) // len(self.mask))
        live = found.kept if found.live is None else found.live
        if live is not None and reads:
            a = a.index_select(1, live)
        elif live is not None and found.kept is not None:
            b = b.index_select(0, live)
            bias = bias if bias is None else bias.index_select(0, found.kept)
        weight = self.weight(name, base.weight, found.kept, dim=int(reads))
        return LoraLayer(weight=weight, lora_a=a, lora_b=b, bias=bias)

    def live(self, structure_width: int) -> Live:
        """The live rows (or columns) of a projection of `structure_width` a structure.

        Looked at again only after a LoRA factor that decides on it was written to.
        """
        versions = [(tensor._version, tensor.data_ptr()) for tensor, _ in self._watched]
        if versions != self._versions:
            self._versions, self._live = versions, {}
        if structure_width not in self._live:
            self._live[structure_width] = self._find(structure_width)
        return self._live[structure_width]

    def weight(self, name: str, weight: Tensor, kept: Tensor | None, dim: int) -> Tensor:
        """The kept rows (dim 0) or columns (dim 1) of a frozen weight, in the type to compute in.

        Kept for as long as the decision stands and the weight is not written to. A weight that is
        trained is gathered anew, for its gradient's sake.
        """
        if kept is None:
            return dense_weight(weight)
        device = weight.device.type
        kind = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        if weight.requires_grad:
            return weight.index_select(dim, kept)
        key = (weight.data_ptr(), weight._version, kind)
        found = self._gathered.get(name)
        if found is None or found[0] != key:
            # What is made in inference mode could not be trained through later.
            with torch.inference_mode(False):
                gathered = dense_weight(weight).index_select(dim, kept).to(kind)
            found = self._gathered[name] = key, gathered
        return found[1]

    def _watch(self) -> list[tuple[Tensor, int]]:
        """(factor, its dimension of structures): a removed structure is dead when its share of
        every one of them is zero."""
        if self.placement == "whole":
            return []
        factors = {name: (p.lora_A["default"].weight, p.lora_B["default"].weight)
                   for name, p in self.projections.items()}  # fmt: skip
        if "o_proj" in factors:
            return [(factors["v_proj"][1], 0), (factors["o_proj"][0], 1)]
        return [(factors["gate_proj"][1], 0), (factors["up_proj"][1], 0)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _find(self, width: int) -> Live:
        if not len(self.removed):
            return Live(kept=None, live=None)
        kept = _spread(self.kept, width)
        if not self._watched:
            return Live(kept=kept, live=None)
        alive = torch.zeros(len(self.removed), dtype=torch.bool, device=self.mask.device)
        for factor, dim in self._watched:
            share = factor.unflatten(dim, (len(self.mask), -1)).movedim(dim, 0).flatten(1)
            alive |= share.index_select(0, self.removed).ne(0).any(1)
        extra = self.removed[alive]
        return Live(
            kept=kept, live=torch.cat([kept, _spread(extra, width)]) if len(extra) else None
        )


def _spread(structures: Tensor, width: int) -> Tensor:
    """Structures -> their rows, `width` each."""
    within = torch.arange(width, device=structures.device)
    return (structures[:, None] * width + within).flatten()
