"""A fixed decision at one site, its narrow weights held in buffers [W | s B] (a GPU's path).

As compact_site.py, whose head says which structures are live; but what is gathered stays where it
lies: when the decision moves, the rows (or columns) of structures that came or went are copied and
no others, and generator steps between do not take the buffers apart. A structure that is removed
and still live has rows of zeros for its frozen weight. A removed one whose LoRA has become zero is
computed, to no effect, until the decision moves.

What is live is looked at for all sites with one read by the host, when a decision is set. Between,
`grown` says on the device whether one has come to life that is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from atp_kernels import (
    JoinedWeights,
    LoraLayer,
    dense_weight,
    joined_lora_linears,
    prefix_lora_linears,
)
from atp_kernels.autocast import compute_type
from atp_kernels.joined_lora import room_for
from torch import Tensor

from atp_edge.masking.caching import SharedInput
from atp_edge.masking.liveness import alive
from atp_edge.masking.lora import MaskedLoraLinear, Placement
from atp_edge.masking.slots import EMPTY, placed, quantum_of
from atp_edge.model.families import READER_OF
from atp_edge.model.structures import on_host

Projections = Mapping[str, MaskedLoraLinear]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A decision at one site, as it is to be put there; mask: bool [size] on the device."""

    mask: Tensor
    placement: Placement
    projections: Projections


class JoinedSite:
    """The projections of one site under a fixed decision; buffers are its predecessor's."""

    def __init__(
        self,
        standing: Standing,
        kept: Sequence[int],
        slots: Sequence[int],
        before: JoinedSite | None,
    ) -> None:
        """kept: the decision's structures; slots: the live ones, by slot."""
        self.standing, self.slots, self.kept = standing, list(slots), frozenset(kept)
        self.projections = standing.projections
        self._mask_version = standing.mask._version
        self._buffers: dict[str, _Buffer] = before._buffers if before else {}
        self._once = SharedInput()
        self._rows: dict[int, Tensor] = {}
        device, size = standing.mask.device, len(standing.mask)
        self.listed = torch.zeros(size, dtype=torch.bool, device=device)
        order = [max(s, 0) for s in slots]
        self._order = torch.tensor(order, dtype=torch.long, device=device)
        if slots:
            self.listed[torch.tensor([s for s in slots if s != EMPTY], device=device)] = True
        self._natural = self.slots == list(range(size))
        self._filled = self._flags([s != EMPTY for s in slots])
        self._keeps = self._flags([s in self.kept for s in slots])

    def _flags(self, slots: list[bool]) -> Tensor | None:
        """By slot; None: all."""
        return None if all(slots) else torch.tensor(slots, device=self.listed.device)

    def stands(self, standing: Standing) -> bool:
        """Whether this is the decision already, the very masks."""
        same = standing.mask is self.standing.mask and standing.placement == self.standing.placement
        return same and standing.mask._version == self._mask_version

    def grown(self) -> Tensor:
        """Whether a structure has come to life that has no slot: a bool on the device."""
        now = alive(self.standing.mask, self.standing.placement, self.projections)
        return (now & ~self.listed).any()

    def compute(self, name: str, x: Tensor) -> Tensor:
        """One projection's output; the writers are one product, of which each takes its part."""
        if name in READER_OF.values():
            return self._product([name], x)

        def together(x: Tensor) -> dict[str, Tensor]:
            rows = [len(self.slots) * self._width(n) for n in self.writers]
            return dict(zip(self.writers, self.written(x).split(rows, -1), strict=True))

        return self._once.take(name, x, together)

    @property
    def writers(self) -> list[str]:
        """q, k, v or gate, up."""
        return [name for name in self.projections if name not in READER_OF.values()]

    @property
    def reader(self) -> str:
        """o or down."""
        return next(name for name in self.projections if name in READER_OF.values())

    def written(self, x: Tensor) -> Tensor:
        """x [..., H] -> the outputs of all writers, one after the other."""
        return self._product(self.writers, x)

    @torch.no_grad()
    def room(self, names: list[str], kind: torch.dtype) -> tuple[Tensor | None, int]:
        """(A of these projections in a type, columns of their buffer beside x); (None, 0): there is
        no buffer, for the weights are trained."""
        if self._trained(names):
            return None, 0
        factors = [self._factor_a(name).to(kind) for name in names]
        return torch.cat(factors), room_for(sum(len(a) for a in factors))

    def _product(self, names: list[str], x: Tensor) -> Tensor:
        kind = compute_type(x)
        scaling = self.projections[names[0]].scaling["default"]
        layers = [self._layer(name, kind) for name in names]
        if self._trained(names):
            pairs = zip(names, layers, strict=True)
            whole = [self._with_weight(name, layer, kind) for name, layer in pairs]
            return torch.cat(prefix_lora_linears(x, whole, scaling=scaling), -1)
        weights = self._weights(names, kind, layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert not biases or len(biases) == len(layers)
        return joined_lora_linears(
            x,
            weights,
            [(layer.lora_a, layer.lora_b) for layer in layers],
            scaling=scaling,
            bias=torch.cat(biases) if biases else None,
        )

    def _trained(self, names: list[str]) -> bool:
        return any(self.projections[name].get_base_layer().weight.requires_grad for name in names)

    def _layer(self, name: str, kind: torch.dtype) -> LoraLayer:
        """LoRA and bias of the live structures; the weight as it is, whole."""
        parts = self.projections[name].parts()
        a, b, bias = self._factor_a(name), parts.lora_b, parts.bias
        width = self._width(name)
        if name not in READER_OF.values():
            b = self._select(b, 0, width)
            if self._filled is not None:
                b = b * _spread(self._filled, width)[:, None]
            if bias is not None:
                bias = self._select(bias, 0, width)
                bias = bias if self._keeps is None else bias * _spread(self._keeps, width)
        a, b = a.to(kind), b.to(kind)
        return LoraLayer(
            weight=parts.weight, lora_a=a, lora_b=b, bias=None if bias is None else bias.to(kind)
        )

    def _factor_a(self, name: str) -> Tensor:
        a = self.projections[name].lora_A["default"].weight
        return self._select(a, 1, self._width(name)) if name in READER_OF.values() else a

    def _with_weight(self, name: str, layer: LoraLayer, kind: torch.dtype) -> LoraLayer:
        """The layer with the narrow weight made anew, for it is trained."""
        dim, width = int(name in READER_OF.values()), self._width(name)
        weight = self._select(layer.weight, dim, width).to(kind)
        if self._keeps is not None:
            keeps = _spread(self._keeps, width)
            weight = weight * (keeps[None, :] if dim else keeps[:, None])
        return LoraLayer(weight=weight, lora_a=layer.lora_a, lora_b=layer.lora_b, bias=layer.bias)

    def _select(self, values: Tensor, dim: int, width: int) -> Tensor:
        if self._natural:
            return values
        if width not in self._rows:
            with torch.inference_mode(False):
                within = torch.arange(width, device=self._order.device)
                self._rows[width] = (self._order[:, None] * width + within).flatten()
        return values.index_select(dim, self._rows[width])

    def _width(self, name: str) -> int:
        """Rows (or columns) of a projection a structure."""
        module = self.projections[name]
        reads = name in READER_OF.values()
        return int(module.in_features if reads else module.out_features) // len(self.standing.mask)

    def _weights(
        self, names: list[str], kind: torch.dtype, layers: Sequence[LoraLayer]
    ) -> JoinedWeights:
        buffer = self._buffers.setdefault(names[0], _Buffer())
        with torch.inference_mode(False), torch.no_grad():
            buffer.gather(
                [layer.weight for layer in layers],
                [s if s in self.kept else EMPTY for s in self.slots],
                [self._width(name) for name in names],
                [len(layer.lora_a) for layer in layers],
                kind,
                reads=names[0] in READER_OF.values(),
            )
            whole = [self.projections[name].lora_B["default"].weight for name in names]
            scaling = self.projections[names[0]].scaling["default"]
            return buffer.with_lora(whole, [layer.lora_b for layer in layers], scaling, self._order)


@dataclass
class _Buffer:
    """[W | s B] of some projections, and what lies in it."""

    weights: JoinedWeights | None = None
    held: list[int] = field(default_factory=list)
    copied: int = 0
    """Structures that `gather` ever copied."""
    _frozen: object = None
    _low_rank: object = None

    def gather(
        self,
        weights: Sequence[Tensor],
        wanted: list[int],
        widths: Sequence[int],
        ranks: Sequence[int],
        kind: torch.dtype,
        *,
        reads: bool,
    ) -> None:
        """Make the buffer hold these structures of the weights, by slot; zeros where `EMPTY`."""
        rows = [len(w) if reads else len(wanted) * n for w, n in zip(weights, widths, strict=True)]
        columns = len(wanted) * widths[0] if reads else weights[0].shape[1]
        key = (kind, tuple(ranks), *((w.data_ptr(), w._version) for w in weights))
        at = self.weights
        if at is None or at.rows != tuple(rows) or at.columns != columns or self._frozen != key:
            like = weights[0].new_empty(0, dtype=kind)
            self.weights = at = None  # Freed before the next one is made.
            self.weights = at = JoinedWeights.empty(columns, rows, ranks, like)
            self.held, self._frozen, self._low_rank = [EMPTY] * len(wanted), key, None
        changed = [i for i, (a, b) in enumerate(zip(self.held, wanted, strict=True)) if a != b]
        self.copied += sum(wanted[i] != EMPTY for i in changed)
        for to, weight, width in zip(at.frozen(), weights, widths, strict=True) if changed else ():
            _copy(to, dense_weight(weight), changed, wanted, width, dim=int(reads))
        self.held = wanted

    def with_lora(
        self, whole: Sequence[Tensor], live: Sequence[Tensor], scaling: float, order: Tensor
    ) -> JoinedWeights:
        """The buffer with s B of the live rows; whole: the factors that these are rows of."""
        assert self.weights is not None
        key = (scaling, id(order), *((b.data_ptr(), b._version) for b in whole))
        # A graph that is captured writes them at every replay.
        if key != self._low_rank or _capturing(order):
            self.weights.fill(live, scaling)
            self._low_rank, self._order = key, order  # Held, so that its id stays its own.
        return self.weights


def _copy(
    to: Tensor, weight: Tensor, slots: list[int], wanted: list[int], width: int, *, dim: int
) -> None:
    """The rows (or columns) of the structures in these slots."""
    device = to.device
    coming = [i for i in slots if wanted[i] != EMPTY]
    going = [i for i in slots if wanted[i] == EMPTY]
    if going:
        to.index_fill_(dim, _lines(going, width, device), 0)
    if coming:
        found = weight.index_select(dim, _lines([wanted[i] for i in coming], width, device))
        to.index_copy_(dim, _lines(coming, width, device), found.to(to.dtype))


def _lines(structures: list[int], width: int, device: torch.device) -> Tensor:
    within = torch.arange(width)
    return (torch.tensor(structures)[:, None] * width + within).flatten().to(device)


def _spread(flags: Tensor, width: int) -> Tensor:
    return flags.repeat_interleave(width) if width > 1 else flags


def _capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def joined_sites(standings: Sequence[Standing], *, held: bool) -> list[JoinedSite | None]:
    """The sites of a decision, in the order given; one read by the host for all that changed.

    held: what stands is as it was looked at, none has `grown`. None: attention without a head,
    which has no shape that transformers' code could view it in.
    """
    before = [_resting(standing.projections) for standing in standings]
    stays = [held and b is not None and b.stands(s) for b, s in zip(before, standings, strict=True)]
    moved = [s for s, stay in zip(standings, stays, strict=True) if not stay]
    read = iter(_read(moved))
    found: list[JoinedSite | None] = []
    for site, standing, stay in zip(before, standings, stays, strict=True):
        if stay:
            found.append(site)
            continue
        kept, live = next(read)
        if not kept and "o_proj" in standing.projections:
            found.append(None)
            continue
        slots = placed(live, site.slots if site else None, quantum_of(len(standing.mask)))
        same = site is not None and site.slots == slots and site.kept == frozenset(kept)
        if same and site is not None and site.stands(standing):
            found.append(site)
        else:
            found.append(JoinedSite(standing, kept, slots, site))
    return found


def _resting(projections: Projections) -> JoinedSite | None:
    site = next(iter(projections.values())).rested
    return site if isinstance(site, JoinedSite) else None


@torch.no_grad()
def _read(standings: Sequence[Standing]) -> list[tuple[list[int], list[int]]]:
    """The structures kept, and those live, of every site."""
    flags = [f for s in standings for f in (s.mask, alive(s.mask, s.placement, s.projections))]
    lists: list[list[int]] = [part.nonzero().flatten().tolist() for part in on_host(flags)]
    return list(zip(lists[::2], lists[1::2], strict=True))
