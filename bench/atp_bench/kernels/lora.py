"""One masked LoRA layer against peft, addmm, torch.compile and weights sliced beforehand.

Setup is apart from timing: a rival is a function of the inputs that gives a callable x -> y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from atp_kernels import (
    JoinedWeights,
    LoraLayer,
    joined_lora_linears,
    masked_lora_linear,
    prefix_lora_linears,
    reference,
)
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from atp_bench.kernels.dtypes import TOLERANCE, TORCH, Dtype
from atp_bench.kernels.forward_backward import Times, clocked, compared, largest_error

SCALING = 2.0
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """One layer: out_features under a mask of which `kept` stays."""

    in_features: int
    out_features: int
    rank: int
    tokens: int
    kept: float
    dtype: Dtype

    @property
    def flops(self) -> float:
        """Of forward and gradient of x over the kept rows, and of the low-rank paths."""
        rows = round(self.kept * self.out_features)
        low_rank = self.rank * (self.in_features + rows)
        return self.tokens * (4.0 * self.in_features * rows + 6.0 * low_rank)

    @property
    def bytes_moved(self) -> float:
        """At least: W twice, x and y each way, in the case's type."""
        rows = round(self.kept * self.out_features)
        size = TORCH[self.dtype].itemsize
        weight = 2.0 * self.in_features * rows
        return size * (weight + 2.0 * self.tokens * (self.in_features + rows))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """x, dy [M, .], W [N, K], A [r, K], B [N, r], mask [N] of a case, under the whole placement."""

    x: Tensor
    dy: Tensor
    layer: LoraLayer
    mask: Tensor

    @cached_property
    def narrow_dy(self) -> Tensor:
        """dy of the kept rows."""
        return self.dy[:, self.mask]


def make_inputs(case: LoraCase, device: str) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    kind = TORCH[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, kind)

    n, k = case.out_features, case.in_features
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=draw)[: round(case.kept * n)]] = True
    layer = LoraLayer(
        weight=normal(n, k) / k**0.5,
        lora_a=(normal(case.rank, k) / k**0.5).requires_grad_(),
        lora_b=(normal(n, case.rank) * 0.1).requires_grad_(),
    )
    return Inputs(
        x=normal(case.tokens, k).requires_grad_(),
        dy=normal(case.tokens, n),
        layer=layer,
        mask=mask.to(device),
    )


def ours(made: Inputs) -> Layer:
    """A fixed decision, by the backend chosen; gathering and masks included."""
    part = made.layer
    return lambda x: masked_lora_linear(
        x, part.weight, part.lora_a, part.lora_b, out_mask=made.mask, scaling=SCALING,
        placement="whole",
    )  # fmt: skip


def ours_narrow(made: Inputs) -> Layer:
    """As the training core calls it: frozen rows gathered once a decision, the output narrow."""
    rows = made.mask.nonzero().squeeze(1)
    weight, a, b = made.layer.weight[rows].contiguous(), made.layer.lora_a, made.layer.lora_b

    def layer(x: Tensor) -> Tensor:
        part = LoraLayer(weight=weight, lora_a=a, lora_b=b.index_select(0, rows))
        return prefix_lora_linears(x, [part], scaling=SCALING)[0]

    return layer


def ours_joined(made: Inputs) -> Layer:
    """As the training core calls it on a GPU: [W | s B] gathered once a decision, one product; s B
    is written to it anew in every call."""
    rows = made.mask.nonzero().squeeze(1)
    a, b = made.layer.lora_a, made.layer.lora_b
    weights = JoinedWeights.empty(made.x.shape[1], [len(rows)], [len(a)], like=made.x)
    weights.frozen()[0].copy_(made.layer.weight[rows])

    def layer(x: Tensor) -> Tensor:
        live = b.index_select(0, rows)
        weights.fill([live], SCALING)
        return joined_lora_linears(x, weights, [(a, live)], scaling=SCALING)

    return layer


def sliced(made: Inputs) -> Layer:
    """The honest rival: plain products on weights sliced beforehand, nothing gathered."""
    rows = made.mask.nonzero().squeeze(1)
    weight, a = made.layer.weight[rows].contiguous(), made.layer.lora_a
    b = made.layer.lora_b
    return lambda x: F.linear(x, weight) + SCALING * F.linear(F.linear(x, a), b[rows])


def peft(made: Inputs, adapters: torch.dtype, *, masked: bool = True) -> Layer:
    """peft's own layer on the dense weight, then the mask, if it is to be; adapters in fp32 or the
    model's type."""
    part = made.layer
    model = nn.Sequential(nn.Linear(part.weight.shape[1], len(part.weight), bias=False))
    model[0].weight = nn.Parameter(part.weight, requires_grad=False)
    rank = len(part.lora_a)
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["0"])
    injected: Any = inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            factor = part.lora_a if name == "lora_A" else part.lora_b
            weight = factor.detach().to(adapters)
            getattr(injected[0], name)["default"].weight = nn.Parameter(weight)
    return (lambda x: injected(x) * made.mask.to(x.dtype)) if masked else injected


def addmm(made: Inputs) -> Layer:
    """The low-rank product added in the accumulator of torch's own product, then the mask."""
    part = made.layer
    return lambda x: (
        torch.addmm(
            F.linear(x, part.weight), F.linear(x, part.lora_a), part.lora_b.T, alpha=SCALING
        )
        * made.mask.to(x.dtype)
    )


def rivals(made: Inputs, *, compiled: bool) -> dict[str, Layer]:
    """All that is timed, peft with adapters of the model's type first: the others are over it."""
    found = {
        "peft, adapters as the model": peft(made, made.x.dtype),
        "peft, fp32 adapters": peft(made, torch.float32),
        "addmm": addmm(made),
        "weights sliced beforehand": sliced(made),
        "ours, masked output": ours(made),
        "ours, narrow output": ours_narrow(made),
        "ours, joined": ours_joined(made),
    }
    if compiled:
        found["addmm, torch.compile"] = torch.compile(addmm(made))
    return found


def error_of(layer: Layer, made: Inputs) -> float:
    """The largest error of y and of its gradients against float64.

    A narrow output is compared with the kept columns. peft keeps factors of its own: only the
    gradient of x is compared there.
    """
    part = made.layer
    leaves = (made.x, part.weight, part.lora_a, part.lora_b)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    want = reference.masked_lora_linear(
        *exact, out_mask=made.mask, scaling=SCALING, placement="whole"
    )
    learned = [i for i, t in enumerate(leaves) if t.requires_grad]
    wanted = torch.autograd.grad(want, [exact[i] for i in learned], made.dy.double())
    y, dy = _run(layer, made)
    found = torch.autograd.grad(y, [leaves[i] for i in learned], dy, allow_unused=True)
    kept = want.detach() if y.shape == want.shape else want.detach()[:, made.mask]
    return largest_error([y.detach(), *found], [kept, *wanted])


def _run(layer: Layer, made: Inputs) -> tuple[Tensor, Tensor]:
    y = layer(made.x)
    return y, made.dy if y.shape == made.dy.shape else made.narrow_dy


def timed(layer: Layer, made: Inputs) -> Times:
    """One forward and backward."""
    made.x.grad = made.layer.lora_a.grad = made.layer.lora_b.grad = None
    return clocked(lambda: _run(layer, made))


def bench_lora(case: LoraCase, *, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    """Every rival of one case."""
    made = make_inputs(case, device)
    rows = compared(
        rivals(made, compiled=compiled),
        times=lambda layer: timed(layer, made),
        error=lambda layer: error_of(layer, made),
        rounds=rounds,
        tolerance=TOLERANCE[case.dtype],
        flops=case.flops,
    )
    return {"case": asdict(case), "intensity": case.flops / case.bytes_moved, "rows": rows}
