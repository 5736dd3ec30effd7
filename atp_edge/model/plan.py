"""The decision as a file: which structures of each site stay."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_edge.config import StructureSpace
from atp_edge.model.families import LayerShape, ModelShape
from atp_edge.model.structures import Site, SiteKind, count_parameters, site_index, sites_of
from atp_edge.run.files import write_atomically

SCHEMAS: dict[StructureSpace, int] = {"groups": 1, "head-dims": 2}
"""Of the file, by structure space: the first schema names none."""


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """The structures of one site that stay, ascending."""

    layer: int
    kind: SiteKind
    size: int
    kept: tuple[int, ...]

    @property
    def width(self) -> int:
        return len(self.kept)

    def mask(self) -> Tensor:
        """Which structures stay, bool [size]."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(self.kept)] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A final decision over all sites of a model, in the order of `sites_of`."""

    family: str
    sites: tuple[SitePlan, ...]
    space: StructureSpace = "groups"

    def site(self, layer: int, kind: SiteKind) -> SitePlan:
        return self.sites[site_index(layer, kind)]

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths (of `groups`: an ordinary checkpoint)."""
        return len({(s.kind, s.width) for s in self.sites}) == len({s.kind for s in self.sites})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(to_json(self).encode()).hexdigest()


def plan_of(
    shape: ModelShape, kept: list[tuple[int, ...]], space: StructureSpace = "groups"
) -> Plan:
    """A plan from the kept structures of every site; checked against the model's shape."""
    sites = tuple(
        SitePlan(layer=s.layer, kind=s.kind, size=s.size, kept=tuple(sorted(k)))
        for s, k in zip(sites_of(shape, space), kept, strict=True)
    )
    plan = Plan(family=shape.family, sites=sites, space=space)
    check_plan(plan, shape)
    return plan


def all_kept(shape: ModelShape, space: StructureSpace = "groups") -> Plan:
    """The identity: every structure stays."""
    return plan_of(shape, [tuple(range(s.size)) for s in sites_of(shape, space)], space)


def check_plan(plan: Plan, shape: ModelShape) -> None:
    """Raise ValueError unless the plan belongs to a model of this shape."""
    expected = sites_of(shape, plan.space)
    if len(plan.sites) != len(expected):
        raise ValueError(
            f"the plan has {len(plan.sites)} sites, the model {len(expected)}: "
            "it was made for another model; run `atp-edge train` on this one"
        )
    for site, want in zip(plan.sites, expected, strict=True):
        _check_site(site, want)


def _check_site(site: SitePlan, want: Site) -> None:
    if (site.layer, site.kind, site.size) != (want.layer, want.kind, want.size):
        raise ValueError(
            f"the plan's site layers.{site.layer}.{site.kind} has {site.size} structures where "
            f"the model's {want.name} has {want.size}: it was made for another model"
        )
    if not site.kept or list(site.kept) != sorted(set(site.kept)) or site.kept[-1] >= want.size:
        raise ValueError(
            f"the plan keeps {list(site.kept)[:8]}… of {want.name}; expected one or more distinct "
            f"indices below {want.size}, ascending"
        )
    if site.kept[0] < 0:
        raise ValueError(f"the plan keeps the negative index {site.kept[0]} at {want.name}")


def narrow_shape(shape: ModelShape, plan: Plan) -> ModelShape:
    """The shape of the narrow model that the plan makes of a dense one."""
    check_plan(plan, shape)
    layers = tuple(
        replace(
            narrow_attention(layer, plan.site(i, "attention").kept, plan.space),
            channels=plan.site(i, "mlp").width,
        )
        for i, layer in enumerate(shape.layers)
    )
    return replace(shape, layers=layers)


def narrow_attention(layer: LayerShape, kept: tuple[int, ...], space: StructureSpace) -> LayerShape:
    """A dense layer whose attention keeps these structures."""
    if space == "groups":
        return replace(layer, heads=len(kept) * layer.group_heads, kv_heads=len(kept))
    whole = 2 * len(kept) == layer.head_dim
    return replace(layer, head_dim=2 * len(kept), rope_pairs=None if whole else kept)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What stays, of the decoder layers and of the whole model, in parameters."""

    decoder: float
    whole: float


def shares(dense: ModelShape, narrow: ModelShape) -> Shares:
    """Kept shares of parameters, exactly counted."""
    full, slim = count_parameters(dense), count_parameters(narrow)
    return Shares(decoder=slim.decoder / full.decoder, whole=slim.whole / full.whole)


def to_json(plan: Plan) -> str:
    """One site a line, so that a plan can be read and compared."""
    sites = ",\n  ".join(json.dumps(asdict(site)) for site in plan.sites)
    about: dict[str, object] = {"schema": SCHEMAS[plan.space], "family": plan.family}
    if plan.space != "groups":
        about["space"] = plan.space
    head = json.dumps(about).removesuffix("}")
    return f'{head}, "sites": [\n  {sites}\n]}}\n'


def write_plan(plan: Plan, path: Path) -> None:
    write_atomically(path, to_json(plan))


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises ValueError when the file is not one of a known schema."""
    try:
        raw = json.loads(path.read_bytes())
        space = raw.get("space", "groups")
        if raw["schema"] != SCHEMAS[space]:
            raise ValueError(f"schema {raw['schema']!r}, expected {SCHEMAS[space]}")
        sites = tuple(_site(site) for site in raw["sites"])
        return Plan(family=raw["family"], sites=sites, space=space)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a plan of atp-edge: {error!r}") from error


def _site(raw: dict[str, Any]) -> SitePlan:
    site = SitePlan(**{**raw, "kept": tuple(raw["kept"])})
    if not all(type(number) is int for number in (site.layer, site.size, *site.kept)):
        raise ValueError(f"layer, size and kept of {raw} are no whole numbers")
    return site
