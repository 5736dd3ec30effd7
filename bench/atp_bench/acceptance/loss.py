"""The loss in chunks of labelled tokens, at the vocabulary's real size: time and peak by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import free, host_costs
from atp_edge import losses

_CHUNKS = (256, 512, 1024, 2048, 4096)


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Forward and backward to the hidden states, over torch's own cross-entropy of all at once."""
    draw = torch.Generator(device=sizes.device).manual_seed(0)
    shape = (sizes.tokens, sizes.hidden)
    hidden = torch.randn(shape, generator=draw, device=sizes.device, dtype=sizes.dtype)
    hidden.requires_grad_()
    targets = torch.randint(0, sizes.vocabulary, shape[:1], generator=draw, device=sizes.device)
    head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=sizes.device)
    head = head.to(sizes.dtype).requires_grad_(False)

    def whole() -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), targets)

    def run(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: torch.autograd.grad(loss(), hidden)[0]

    exact = run(whole)()
    rows: dict[str, Any] = {"torch, all at once": host_costs(run(whole), sizes.device)}
    for chunk in _CHUNKS if not sizes.toy else (8, 32):
        with _chunks_of(chunk):
            ours = run(lambda: losses.mean_cross_entropy(hidden, head, targets))
            error = float((ours() - exact).float().norm() / exact.float().norm())
            rows[f"ours, {chunk}"] = host_costs(ours, sizes.device) | {"difference": error}
        keep({"rows": rows})
        free()
    return {"rows": rows, "vocabulary": sizes.vocabulary, "tokens": sizes.tokens,
            "today": losses.CHUNK_TOKENS}  # fmt: skip


@contextmanager
def _chunks_of(tokens: int) -> Iterator[None]:
    before = losses.CHUNK_TOKENS
    losses.CHUNK_TOKENS = tokens
    try:
        yield
    finally:
        losses.CHUNK_TOKENS = before
