"""One masked LoRA layer (and the masked SwiGLU, and a CPU's attention) against its rivals.

Setup is apart from timing: a rival is a function of the case that gives a callable x -> y. All take
turns round by round. A rival's speed is kept only where its output and its gradients are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from atp_kernels import LoraLayer, backend_name, masked_lora_linear, prefix_lora_linears, reference
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from atp_bench.kernels.attention import AttentionCase, bench_attention
from atp_bench.kernels.interleaved_timing import Times, clocked, interleaved_timing, rows
from atp_bench.kernels.swiglu import SwigluCase, bench_swiglu
from atp_edge.run.environment import environment

# in_features, out_features
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "small": ((576, 576), (576, 1536), (1536, 576)),
    "7b": ((4096, 4096), (4096, 11008), (4096, 14336), (11008, 4096)),
}
# of the same models' MLPs
CHANNELS: dict[str, tuple[int, ...]] = {"small": (1536,), "7b": (11008, 14336)}
# heads, key and value heads, dimensions of a head
HEADS: dict[str, tuple[int, int, int]] = {"small": (9, 3, 64), "7b": (32, 8, 128)}
KEPT = (1.0, 0.75, 0.6, 0.5, 0.25)
SCALING = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the largest value of the output or gradient, against float64: a few units in the last place of
# the type, and the rounding of x A^T before its second product.
TOLERANCE = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 5e-3}
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: out_features under a mask of which `kept` stays."""

    in_features: int
    out_features: int
    rank: int
    tokens: int
    kept: float
    dtype: Literal["fp32", "bf16", "fp16"]

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
        size = DTYPES[self.dtype].itemsize
        weight = 2.0 * self.in_features * rows
        return size * (weight + 2.0 * self.tokens * (self.in_features + rows))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """x, dy [M, .], W [N, K], A [r, K], B [N, r], mask [N] of a case, under the whole placement."""

    x: Tensor
    dy: Tensor
    layer: LoraLayer
    mask: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    kind = DTYPES[case.dtype]

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


def sliced(made: Inputs) -> Layer:
    """The honest rival: plain products on weights sliced beforehand, nothing gathered."""
    rows = made.mask.nonzero().squeeze(1)
    weight, a = made.layer.weight[rows].contiguous(), made.layer.lora_a
    b = made.layer.lora_b
    return lambda x: F.linear(x, weight) + SCALING * F.linear(F.linear(x, a), b[rows])


def peft(made: Inputs, adapters: torch.dtype) -> Layer:
    """peft's own layer on the dense weight, then the mask; adapters in fp32 or the model's type."""
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
    return lambda x: injected(x) * made.mask.to(x.dtype)


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
    }
    if compiled:
        found["addmm, torch.compile"] = torch.compile(addmm(made))
    return found


def error_of(layer: Layer, made: Inputs) -> float:
    """The largest error of y and of its gradients against float64, over each one's largest value.

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
    pairs = [(y.detach(), kept), *((a, b) for a, b in zip(found, wanted, strict=True))]
    return max(
        float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs if a is not None
    )


def _run(layer: Layer, made: Inputs) -> tuple[Tensor, Tensor]:
    y = layer(made.x)
    return y, made.dy if y.shape == made.dy.shape else made.dy[:, made.mask]


def timed(layer: Layer, made: Inputs) -> Times:
    """One forward and backward."""
    made.x.grad = made.layer.lora_a.grad = made.layer.lora_b.grad = None
    return clocked(lambda: _run(layer, made))


def bench_case(case: Case, *, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    """Every rival of one case: medians, its error, and its speedup if the error is in bounds."""
    made = make_inputs(case, device)
    layers = rivals(made, compiled=compiled)
    errors = {name: error_of(layer, made) for name, layer in layers.items()}
    found = interleaved_timing(
        {n: partial(timed, layer, made) for n, layer in layers.items()}, rounds
    )
    return {
        "case": asdict(case),
        "intensity": case.flops / case.bytes_moved,
        "rows": rows(found, errors, tolerance=TOLERANCE[case.dtype], flops=case.flops),
    }


def roofs(dtype: Literal["fp32", "bf16", "fp16"], device: str) -> dict[str, float]:
    """This machine's own: the best of 5 of a large product, and of a copy."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    buffer = torch.empty(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device)

    def best(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return {
        "flops_per_s": 2.0 * size**3 / best(lambda: a @ a),
        "bytes_per_s": 2.0 * buffer.nbytes / best(buffer.clone),
    }


def bench_kernels(
    *,
    shapes: Literal["small", "7b"],
    tokens: tuple[int, ...],
    ranks: tuple[int, ...],
    kept: tuple[float, ...],
    dtype: Literal["fp32", "bf16", "fp16"],
    rounds: int,
    device: str,
    compiled: bool,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """The figures of `atp-edge bench kernels`; `keep` gets them after every case, for there are
    many on a GPU. Raises ValueError for settings out of range."""
    if rounds < 1 or min(*tokens, *ranks) < 1 or not all(0 < share <= 1 for share in kept):
        raise ValueError(
            f"rounds {rounds}, tokens {tokens}, ranks {ranks}, kept {kept}: expected 1 or more, "
            "and shares above 0 and up to 1"
        )
    figures: dict[str, Any] = {
        "cases": [],
        "swiglu": [],
        "attention": [],
        "roofs": roofs(dtype, device),
        "backend": backend_name(),
        "gpu_figures": "measured" if device == "cuda" else "not measured yet",
        "settings": {"rounds": rounds, "dtype": dtype, "device": device,
                     "threads": torch.get_num_threads()},
        "environment": environment(),
    }  # fmt: skip

    def add(part: str, measured: dict[str, Any]) -> None:
        figures[part].append(measured)
        keep(figures)

    kind, tolerance = DTYPES[dtype], TOLERANCE[dtype]
    for (k, n), rank, count, share in product(SHAPES[shapes], ranks, tokens, kept):
        progress(f"{k} -> {n}, rank {rank}, {count} tokens, {share:.0%} kept")
        case = Case(in_features=k, out_features=n, rank=rank, tokens=count, kept=share, dtype=dtype)
        add("cases", bench_case(case, rounds=rounds, device=device, compiled=compiled))
    for channels, count in product(CHANNELS[shapes], tokens):
        progress(f"SwiGLU of {channels} channels, {count} tokens")
        mlp = SwigluCase(channels=channels, tokens=count, dtype=dtype)
        add("swiglu", bench_swiglu(mlp, kind, tolerance=tolerance, rounds=rounds, device=device,
                                   compiled=compiled))  # fmt: skip
    heads, groups, size = HEADS[shapes]
    for count in tokens if device == "cpu" else ():
        progress(f"attention of {heads} heads, {count} tokens")
        asked = AttentionCase(heads=heads, groups=groups, size=size, tokens=count, dtype=dtype)
        add("attention", bench_attention(asked, kind, tolerance=tolerance, rounds=rounds))
    return figures
