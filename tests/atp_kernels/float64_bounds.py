"""How far from float64 a result may lie: what torch itself does at the same precision, and what one
more rounding of the inputs would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.triton_process import DEVICE


def rounded_again(value: torch.Tensor, kind: torch.dtype, draw: int | None) -> torch.Tensor:
    """In `kind`, and as if `value`'s type had rounded it once more, up or down; None: as it is."""
    if draw is None:
        return value.to(kind)
    generator = torch.Generator().manual_seed(value.numel() * 10 + draw)
    share = torch.rand(value.shape, generator=generator, dtype=kind) - 0.5
    return value.to(kind) * (1 + torch.finfo(value.dtype).eps * share.to(DEVICE))


def leaves_of(
    inputs: dict[str, Any], kind: torch.dtype, draw: int | None
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The arguments in a type, and those of them that take gradients (bool masks do not)."""
    made = {
        name: rounded_again(value, kind, draw).requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    return made, [v for v in made.values() if isinstance(v, torch.Tensor) and v.requires_grad]


def assert_close(
    ours: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    exact: Callable[[int | None], Sequence[torch.Tensor]],
    units: int,
) -> None:
    """No error is over twice torch's at this precision or, as that may be small by luck, over six
    standard deviations of the result when its inputs are rounded once more; and units in the last
    place. exact(draw): in float64."""
    want = exact(None)
    others = zip(*(exact(draw) for draw in range(8)), strict=True)
    for found, torchs, right, again in zip(ours, plain, want, others, strict=True):
        deviation = (torch.stack(again) - right).square().mean(0).sqrt()
        allowed = torch.maximum(2 * (torchs - right).abs().max(), 6 * deviation.max())
        last_place = torch.finfo(found.dtype).eps * (1 + right.abs().max())
        assert (found - right).abs().max() <= allowed + units * last_place
