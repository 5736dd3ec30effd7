"""The decision that meets the budget exactly, from logits."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.model.structures import Masks, on_host


@dataclass(frozen=True, kw_only=True)
class ProjectedDecision:
    """A decision that meets the budget: masks (bool [size] a site), and for every site the logit
    at which a structure changes sides."""

    masks: Masks
    thresholds: Tensor


def project(logits: list[Tensor], feasible: FeasibleDecisions) -> ProjectedDecision:
    """The decision of largest kept logits, weighed by cost, that meets the budget exactly.

    logits: one tensor [size] a site. A logit is worth per parameter, so keeping the best
    structures under a cost is keeping those above one threshold (a fractional knapsack, solved
    greedily); what is left of the budget after the last step is less than one step of a site.
    """
    read = on_host([x.detach().float() for x in logits])
    ranked = [torch.sort(x, descending=True, stable=True) for x in read]
    values, orders = [r.values for r in ranked], [r.indices for r in ranked]
    widths, thresholds = (_uniform if feasible.uniform else _per_layer)(values, feasible)
    masks = []
    for order, width in zip(orders, widths, strict=True):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:width]] = True
        masks.append(mask)
    return ProjectedDecision(masks=Masks(masks), thresholds=thresholds)


def _per_layer(values: list[Tensor], feasible: FeasibleDecisions) -> tuple[list[int], Tensor]:
    """Greedy over steps of structures, best mean logit first; each site's first step is a must.

    One threshold for all sites: the mean logit of the last step that fits in order.
    """
    worth, cost, owner, count = [], [], [], []
    for i, (value, step, costs_of) in enumerate(
        zip(values, feasible.steps, feasible.costs, strict=True)
    ):
        sizes = torch.tensor([len(chunk) for chunk in value.split(step)])
        means = torch.stack([chunk.mean() for chunk in value.split(step)]) if step > 1 else value
        means = means.clone()
        means[0] = torch.inf
        worth.append(means)
        count.append(sizes)
        cost.append(torch.tensor(costs_of).diff())
        owner.append(torch.full_like(sizes, i))
    worths, order = torch.sort(torch.cat(worth), descending=True, stable=True)
    costs, owners, counts = (torch.cat(x)[order] for x in (cost, owner, count))
    fits = int((torch.cumsum(costs, 0) <= feasible.room).sum())
    widths = torch.zeros(len(values), dtype=torch.long)
    widths.index_add_(0, owners[:fits], counts[:fits])
    left = feasible.room - int(costs[:fits].sum())
    closed: set[int] = set()
    for c, o, n in zip(*(x[fits:].tolist() for x in (costs, owners, counts)), strict=True):
        if o in closed:
            continue
        if c <= left:
            widths[o] += n
            left -= c
        else:
            closed.add(o)
            if len(closed) == len(values):
                break
    threshold = (
        worths[max(fits - 1, len(values))] if len(worths) > len(values) else worths.new_zeros(())
    )
    return widths.tolist(), threshold.expand(len(values)).clone()


def _uniform(values: list[Tensor], feasible: FeasibleDecisions) -> tuple[list[int], Tensor]:
    """The pair of widths (attention, MLP) whose kept logits, weighed by cost, are worth most.

    A threshold a site: between its worst kept and its best removed structure.
    """
    group, channel = feasible.sites[0], feasible.sites[1]
    worth_of_groups = torch.cumsum(torch.stack(values[0::2]).sum(0), 0) * group.unit_parameters
    worth_of_channels = torch.cumsum(torch.stack(values[1::2]).sum(0), 0) * channel.unit_parameters

    def worth(pair: tuple[int, int]) -> float:
        # A mean over parameters, so that a pair is not preferred for spending less.
        groups, channels = pair
        spent = groups * group.unit_parameters + channels * channel.unit_parameters
        return float(worth_of_groups[groups - 1] + worth_of_channels[channels - 1]) / spent

    widths = [*max(_fullest_pairs(feasible), key=worth)] * (len(feasible.sites) // 2)
    worst = torch.stack([v[w - 1] for v, w in zip(values, widths, strict=True)])
    removed = torch.stack([v[min(w, len(v) - 1)] for v, w in zip(values, widths, strict=True)])
    return widths, (worst + removed) / 2


def _fullest_pairs(feasible: FeasibleDecisions) -> list[tuple[int, int]]:
    """Widths (attention, MLP) of all layers that meet the budget and could be no wider."""
    groups_step, step = feasible.steps[:2]
    cost_of_groups, cost_of_channels = (
        [sum(at) for at in zip(*feasible.costs[kind::2], strict=True)] for kind in (0, 1)
    )
    pairs: list[tuple[int, int]] = []
    for groups in feasible.uniform_attention:
        left = feasible.room - cost_of_groups[-(-groups // groups_step)]
        steps = bisect_right(cost_of_channels, left) - 1
        if steps < 1:
            break
        channels = min(steps * step, feasible.sites[1].size)
        # More groups beside as many channels: the pair before could be wider.
        if pairs and pairs[-1][1] == channels:
            pairs.pop()
        pairs.append((groups, channels))
    return pairs
