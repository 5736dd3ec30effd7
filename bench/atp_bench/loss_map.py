"""Where a slim model loses against the dense tuned one: on which tokens, and at which sites.

`atp-edge bench losses --out RUN --json FILE` writes the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.data.splits import Splits
from atp_edge.evaluation.text_loss import text_loss
from atp_edge.losses import token_losses
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.plan import read_plan
from atp_edge.model.structures import SiteKind
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.run.watched import counted
from atp_edge.training.setup import splits_of

# Times a token occurs in the train split; positions in a block.
_COUNTS = (0, 1, 100, 10_000)
_POSITIONS = (0, 64, 256)
MODULES: dict[SiteKind, str] = {"attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, kw_only=True)
class KindLoss:
    """Tokens of one kind: their share of all, nats a token, and their share of the whole loss."""

    by: str
    kind: str
    share: float
    dense: float
    slim: float
    share_of_loss: float


@dataclass(frozen=True, kw_only=True)
class SiteLoss:
    """Nats a token that the dense tuned model loses when this site alone is the slim model's."""

    layer: int
    kind: SiteKind
    kept: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class LossMap:
    """Where the slim model's nats over the dense tuned model's come from."""

    dense: float
    slim: float
    kinds: tuple[KindLoss, ...]
    sites: tuple[SiteLoss, ...]


def map_losses(run: RunFolder, progress: Progress, *, site_blocks: int) -> LossMap:
    """A run's dense and slim checkpoints on its test split, in fp32.

    site_blocks: test blocks for every site, of which a model has twice as many as layers.
    Raises ValueError when a checkpoint is not there yet.
    """
    config = run.config()
    run.require("dense", "slim")
    splits = splits_of(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, slim = (load_narrow(folder).to(device) for folder in (run.dense, run.slim))
    test = splits.test.to(device)
    progress.say(f"{len(test.input_ids)} test blocks, token by token")
    ours, theirs = (_by_token(model, test) for model in (slim, dense))
    plan = read_plan(run.plan)
    progress.say(f"{site_blocks} test blocks for each of {len(plan.sites)} sites")
    losses = site_losses(dense, slim, test.spread(site_blocks))
    return LossMap(
        dense=float(theirs.mean()),
        slim=float(ours.mean()),
        kinds=tuple(_kind_losses(splits, test, theirs, ours)),
        sites=tuple(
            SiteLoss(
                layer=s.layer, kind=s.kind, kept=s.width / s.size, loss=losses[s.layer, s.kind]
            )
            for s in plan.sites
        ),
    )


def _by_token(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    """Nats of every labelled token of blocks, in order, on the CPU."""
    rows = counted(range(len(blocks.input_ids)), "measuring")
    return torch.cat([token_losses(model, blocks.rows([i])).cpu() for i in rows])


def _kind_losses(splits: Splits, test: Blocks, dense: Tensor, slim: Tensor) -> Iterator[KindLoss]:
    labelled = (test.labels[:, 1:] != -100).cpu()
    whole = (slim - dense).sum()
    for by, kinds in token_kinds(splits.train, test).items():
        for kind, where in kinds.items():
            here = where[labelled]
            if here.any():
                yield KindLoss(
                    by=by,
                    kind=kind,
                    share=float(here.float().mean()),
                    dense=float(dense[here].mean()),
                    slim=float(slim[here].mean()),
                    share_of_loss=float((slim - dense)[here].sum() / whole),
                )


def token_kinds(train: Blocks, test: Blocks) -> dict[str, dict[str, Tensor]]:
    """Partitions of the predicted tokens, bool [N, T - 1] a kind."""
    ids = test.input_ids.cpu()
    targets, before = ids[:, 1:], ids[:, :-1]
    largest = int(max(train.input_ids.max(), ids.max())) + 1
    counts = torch.bincount(train.input_ids.flatten(), minlength=largest)[targets]
    positions = torch.arange(1, ids.shape[1]).expand_as(targets)
    pairs = before * largest + targets
    repeated = torch.stack([_seen_before(row) for row in pairs])
    return {
        "occurs in the train text": _ranges(counts, _COUNTS, "times"),
        "position in the block": _ranges(positions, _POSITIONS, ""),
        "after the token before it": {
            "for the first time in the block": ~repeated,
            "again": repeated,
        },
    }


def _ranges(values: Tensor, starts: tuple[int, ...], unit: str) -> dict[str, Tensor]:
    ends = (*starts[1:], None)
    return {
        _range_name(start, end, unit): (values >= start) & (values < (end or values.max() + 1))
        for start, end in zip(starts, ends, strict=True)
    }


def _range_name(start: int, end: int | None, unit: str) -> str:
    last = "or more" if end is None else f"to {end - 1:,}"
    return (f"{start:,} {last} {unit}" if end != start + 1 else f"{start:,} {unit}").strip()


def _seen_before(row: Tensor) -> Tensor:
    """Which values [T] of a row occur earlier in it."""
    _, inverse = torch.unique(row, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(row))
    first.scatter_reduce_(0, inverse, torch.arange(len(row)), "amin")
    return torch.arange(len(row)) > first[inverse]


def site_losses(
    dense: PreTrainedModel, slim: PreTrainedModel, blocks: Blocks
) -> dict[tuple[int, SiteKind], float]:
    """Nats a token over the dense model's own, with one site of the slim model in its place.

    The rest of the slim model has learned to live with what a site lost, so the sum over sites is
    not its whole loss; which sites lose most is what this tells.
    """
    own = text_loss(dense, blocks).mean
    found: dict[tuple[int, SiteKind], float] = {}
    pairs = list(zip(dense.model.layers, slim.model.layers, strict=True))
    for i, (layer, narrow) in enumerate(counted(pairs, "layers")):
        for kind, name in MODULES.items():
            whole = getattr(layer, name)
            setattr(layer, name, getattr(narrow, name))
            found[i, kind] = text_loss(dense, blocks).mean - own
            setattr(layer, name, whole)
    return found


def kinds_table(found: LossMap) -> Table:
    """On which tokens, at 80 columns."""
    shown = Table(
        title=f"nats a token: dense tuned {found.dense:.3f}, slim {found.slim:.3f}",
        title_justify="left",
    )
    shown.add_column("tokens", overflow="fold")
    for name in ("share", "dense", "slim", "of the loss"):
        shown.add_column(name, justify="right", no_wrap=True)
    by = ""
    for k in found.kinds:
        if k.by != by:
            shown.add_row(k.by, style="dim")
        by = k.by
        shown.add_row(f"  {k.kind}", f"{k.share:.1%}", f"{k.dense:.3f}", f"{k.slim:.3f}",
                      f"{k.share_of_loss:.1%}")  # fmt: skip
    return shown


def sites_table(found: LossMap) -> Table:
    """At which sites, a row a layer; 80 columns."""
    shown = Table(title="nats lost when this site alone is slim", title_justify="left")
    shown.add_column("layer", justify="right")
    for kind in MODULES:
        shown.add_column(f"{kind} kept", justify="right")
        shown.add_column("loses", justify="right")
    for attention, mlp in zip(found.sites[0::2], found.sites[1::2], strict=True):
        shown.add_row(str(attention.layer), f"{attention.kept:.0%}", f"{attention.loss:.4f}",
                      f"{mlp.kept:.0%}", f"{mlp.loss:.4f}")  # fmt: skip
    sums = [sum(s.loss for s in found.sites if s.kind == kind) for kind in MODULES]
    shown.add_row("sum", "", f"{sums[0]:.3f}", "", f"{sums[1]:.3f}", style="bold")
    return shown
