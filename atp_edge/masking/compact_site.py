"""A fixed decision at one site: which structures are computed at all.

While a decision stands, q, k, v (or gate, up) give only the live structures, kept ones first, and
o (or down) reads them so; transformers' own attention and MLP work on what they are given, so the
attention itself and the SwiGLU are as narrow as the products. Nothing is scattered to full width.

A removed structure is dead, and not computed, as liveness.py says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from atp_kernels import LoraLayer, dense_weight, prefix_lora_linears
from torch import Tensor

from atp_edge.masking.caching import SharedInput, WeightCache
from atp_edge.masking.liveness import deciding_factors
from atp_edge.masking.lora import MaskedLoraLinear, Placement
from atp_edge.model.families import READER_OF
from atp_edge.model.sharded import here_for_a_while


@dataclass(frozen=True, kw_only=True)
class Live:
    """Indices of a projection's kept rows (or columns), and of the live ones, kept first.

    None for live: the kept ones alone. None for both: all are kept.
    """

    kept: Tensor | None
    live: Tensor | None


class CompactSite:
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
        self._factors = deciding_factors(placement, projections)
        self._versions: list[tuple[int, int]] = []
        self._live: dict[int, Live] = {}
        weights = [module.get_base_layer().weight for module in projections.values()]
        self._gathered = WeightCache(keeps=not any(map(here_for_a_while, weights)))
        self._once = SharedInput()

    def same_as(self, mask: Tensor, placement: Placement) -> bool:
        """Whether this is the decision already, so that what was gathered stands."""
        if placement != self.placement or self.mask._version != self._mask_version:
            return False
        return mask is self.mask or torch.equal(mask, self.mask)

    def compute(self, name: str, x: Tensor) -> Tensor:
        """One projection's output. The writers read one x: the first one asked computes them all,
        and the others take theirs."""
        if name in READER_OF.values():
            return self._together([name], x)[name]
        names = [other for other in self.projections if other not in READER_OF.values()]
        return self._once.take(name, x, lambda x: self._together(names, x))

    def _together(self, names: list[str], x: Tensor) -> dict[str, Tensor]:
        scaling = self.projections[names[0]].scaling["default"]
        outputs = prefix_lora_linears(x, [self._layer(name) for name in names], scaling=scaling)
        return dict(zip(names, outputs, strict=True))

    def _layer(self, name: str) -> LoraLayer:
        parts = self.projections[name].parts()
        a, b, bias = parts.lora_a, parts.lora_b, parts.bias
        reads = name in READER_OF.values()
        found = self.live((a.shape[1] if reads else len(b)) // len(self.mask))
        live = found.kept if found.live is None else found.live
        if live is not None and reads:
            a = a.index_select(1, live)
        elif live is not None and found.kept is not None:
            b = b.index_select(0, live)
            bias = bias if bias is None else bias.index_select(0, found.kept)
        weight = self.weight(name, parts.weight, found.kept, dim=int(reads))
        return LoraLayer(weight=weight, lora_a=a, lora_b=b, bias=bias)

    def live(self, structure_width: int) -> Live:
        """The live rows (or columns) of a projection of `structure_width` a structure.

        Looked at again only after a LoRA factor that decides on it was written to.
        """
        versions = [(tensor._version, tensor.data_ptr()) for tensor, _ in self._factors]
        if versions != self._versions:
            self._versions, self._live = versions, {}
        if structure_width not in self._live:
            self._live[structure_width] = self._find(structure_width)
        return self._live[structure_width]

    def weight(self, name: str, weight: Tensor, kept: Tensor | None, dim: int) -> Tensor:
        """The kept rows (dim 0) or columns (dim 1) of a weight, in the type to compute in."""
        if kept is None:
            return dense_weight(weight)
        return self._gathered.of(name, [weight], lambda weights: weights[0].index_select(dim, kept))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _find(self, width: int) -> Live:
        if not len(self.removed):
            return Live(kept=None, live=None)
        kept = _spread(self.kept, width)
        if not self._factors:
            return Live(kept=kept, live=None)
        alive = torch.zeros(len(self.removed), dtype=torch.bool, device=self.mask.device)
        for factor, dim in self._factors:
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
