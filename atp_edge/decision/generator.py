"""The pruning-decision generator, and its samples (ATP, arXiv 2412.14426, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.projection import project
from atp_edge.model.structures import Masks, Site

WIDTH = 64
ALL_KEPT_BASE = 3.0


class DecisionGenerator(nn.Module):
    """A 64-d input a layer -> transformer encoder -> one bias-free head a site -> logits [size].

    To the paper's head of a site comes one more output, added to all of the site's logits: what
    the structures at a site's border have in common moves the site's width at once, where their
    own gradients are mostly noise.

    `base` is added to the logits: importance scores to start from, or `ALL_KEPT_BASE` everywhere.
    When it starts from importance, the heads start at zero, so that the first decision is exactly
    the importance's.
    """

    def __init__(self, sites: tuple[Site, ...], base: list[Tensor] | None = None) -> None:
        super().__init__()
        layers = 1 + max(site.layer for site in sites)
        self.inputs = nn.Parameter(nn.init.orthogonal_(torch.empty(layers, WIDTH)))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                WIDTH, nhead=4, dim_feedforward=256, dropout=0.0, batch_first=True
            ),
            num_layers=2,
            enable_nested_tensor=False,
        )
        self.norm = nn.LayerNorm(WIDTH)
        heads = [nn.Linear(WIDTH, 1 + site.size, bias=False) for site in sites]
        self.layer_of_site = [site.layer for site in sites]
        for head in heads:
            nn.init.zeros_(head.weight if base is not None else head.weight[:1])
        self.heads = nn.ModuleList(heads)
        for i, site in enumerate(sites):
            start = torch.full((site.size,), ALL_KEPT_BASE) if base is None else base[i]
            self.register_buffer(f"base_{i}", start)

    def forward(self) -> list[Tensor]:
        """Logits, one [size] a site."""
        hidden = self.norm(self.encoder(self.inputs.unsqueeze(0)).squeeze(0))
        outputs = [
            head(hidden[layer]) for head, layer in zip(self.heads, self.layer_of_site, strict=True)
        ]
        return [x[0] + x[1:] + self.get_buffer(f"base_{i}") for i, x in enumerate(outputs)]

    @torch.no_grad()
    def set_base(self, base: list[Tensor]) -> None:
        """Move the logits' base; what was learned is added to it as before."""
        for i, start in enumerate(base):
            self.get_buffer(f"base_{i}").copy_(start)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A decision with its gradients: 0/1 masks [size] a site, straight through to the logits."""

    masks: Masks
    unprojected: list[Tensor]
    """Hard decisions at logit 0, not projected: what the budget penalty counts."""


def decide(
    logits: list[Tensor],
    feasible: FeasibleDecisions,
    *,
    temperature: float,
    noise: torch.Generator | None,
    noise_scale: float = 1.0,
    projected: bool = True,
) -> Decision:
    """Sample a decision (Gumbel-sigmoid, straight-through), or take it as it is without noise.

    The soft decision is centred on the projection's threshold, where its gradient is largest:
    a structure about to change sides feels the loss most.
    """
    noisy = [x if noise is None else x + noise_scale * _logistic(x, noise) for x in logits]
    hard = project(noisy, feasible)
    hard_at_zero = [_straight_through(x >= 0, x / temperature) for x in noisy]
    masks = [
        _straight_through(mask.to(x.device), (x - threshold) / temperature)
        for mask, x, threshold in zip(
            hard.masks, noisy, hard.thresholds.to(noisy[0].device), strict=True
        )
    ]
    return Decision(masks=Masks(masks if projected else hard_at_zero), unprojected=hard_at_zero)


def _straight_through(hard: Tensor, scaled_logits: Tensor) -> Tensor:
    soft = torch.sigmoid(scaled_logits)
    return hard.to(soft.dtype) + (soft - soft.detach())


def _logistic(like: Tensor, noise: torch.Generator) -> Tensor:
    """The difference of two Gumbel variables, drawn on the CPU so that a seed means one thing."""
    uniform = torch.rand(like.shape, generator=noise).clamp(1e-6, 1 - 1e-6)
    return (torch.log(uniform) - torch.log1p(-uniform)).to(like)
