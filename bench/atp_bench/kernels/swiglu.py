"""h = mask * silu(e) * u with every gradient, the mask's too, against Liger's SwiGLU and torch.

What a generator step needs of an MLP between its products. Liger's kernel knows no mask: it stands
after it, as one would write it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from atp_kernels import masked_swiglu, reference
from torch import Tensor
from torch.nn import functional as F

from atp_bench.kernels.dtypes import TOLERANCE, TORCH, Dtype
from atp_bench.kernels.forward_backward import Times, clocked, compared, largest_error

Swiglu = Callable[[Tensor, Tensor, Tensor], Tensor]
LIGER = "Liger's SwiGLU, then the mask"


@dataclass(frozen=True, kw_only=True)
class SwigluCase:
    """e, u [tokens, channels] in a type."""

    channels: int
    tokens: int
    dtype: Dtype

    @property
    def flops(self) -> float:
        """4 an element forward and 9 backward, exp as one; bound by memory on every device."""
        return 13.0 * self.tokens * self.channels


def make_swiglu(case: SwigluCase, device: str) -> tuple[Tensor, ...]:
    """e, u [M, N], mask [N] in (0, 1), dh [M, N]."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((case.tokens, case.channels),) * 2
    e, u = (torch.randn(shape, generator=draw) for shape in shapes)
    mask, dh = torch.rand(case.channels, generator=draw), torch.randn(shapes[0], generator=draw)
    return tuple(t.to(device, TORCH[case.dtype]) for t in (e, u, mask, dh))


def liger_absent(device: str) -> str | None:
    """Why Liger's kernel is not among the rivals; None: it is."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install liger-kernel"
    return None if device == "cuda" else "needs a GPU"


def swiglu_rivals(device: str, *, compiled: bool) -> dict[str, Swiglu]:
    """All that can run here, plain torch first: the others are over it."""

    def plain(e: Tensor, u: Tensor, mask: Tensor) -> Tensor:
        return F.silu(e) * u * mask

    found: dict[str, Swiglu] = {"torch": plain, "ours": masked_swiglu}
    if liger_absent(device) is None:
        from liger_kernel.transformers.functional import liger_swiglu

        found[LIGER] = lambda e, u, mask: liger_swiglu(e, u) * mask
    if compiled:
        found["torch.compile"] = torch.compile(plain)
    return found


def _fresh(made: tuple[Tensor, ...]) -> list[Tensor]:
    """Copies that take gradients: Liger writes its gradients over what it was given."""
    return [t.clone().requires_grad_() for t in made[:3]]


def swiglu_error(rival: Swiglu, made: tuple[Tensor, ...]) -> float:
    """The largest error of h, de, du and dmask against float64."""
    dh = made[3]
    exact = [t.double().requires_grad_() for t in made[:3]]
    e, u, mask = exact
    want = reference.masked_swiglu(e, u, mask)
    wanted = [want.detach(), *torch.autograd.grad(want, exact, dh.double())]
    inputs = _fresh(made)
    h = rival(*inputs)
    found = [h.detach().clone(), *torch.autograd.grad(h, inputs, dh)]
    return largest_error(found, wanted)


def bench_swiglu(case: SwigluCase, *, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    """Every rival of one case, and why one is absent."""
    made = make_swiglu(case, device)

    def times(rival: Swiglu) -> Times:
        inputs = _fresh(made)
        return clocked(lambda: (rival(*inputs), made[3]))

    rows = compared(
        swiglu_rivals(device, compiled=compiled),
        times=times,
        error=lambda rival: swiglu_error(rival, made),
        rounds=rounds,
        tolerance=TOLERANCE[case.dtype],
        flops=case.flops,
    )
    reason = liger_absent(device)
    return {
        "case": asdict(case),
        "rows": rows,
        "absent": {} if reason is None else {LIGER: reason},
    }
