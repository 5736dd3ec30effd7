"""The operators and a training step on this card, held to float64 on it.

An error is over the largest value of the exact result. What is right is at most twice as far from
float64 as plain torch in the same type is, and a few roundings; a step through layers, three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from atp_kernels import LoraLayer, masked_lora_linear, masked_swiglu_mlp, reference
from atp_kernels.backend import Backend
from torch import Tensor
from torch.nn import functional as F

from atp_bench.acceptance.backend import kernels_by, triton_absent
from atp_bench.acceptance.models import llama_with_lora, random_blocks, random_masks
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import free
from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.masking.fused_layers import fuse_layers

_ROUNDINGS = 4
_SCALING = 2.0
_DECISIONS = ((True, "base"), (False, "whole"), (True, "whole"), (False, "base"))
"""Whether it is fixed, and where its mask stands; a toy takes the first two."""
Function = Callable[..., Tensor]


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Errors by case, and whether each is right; `right`: whether all are."""
    if sizes.toy:
        # Triton's interpreter computes bf16 wrongly (docs/kernels.md).
        sizes = replace(sizes, dtype=torch.float16)
    found: dict[str, Any] = {"cases": {}, "triton": triton_absent(sizes.device) or "runs"}
    backends: tuple[Backend, ...] = ("torch", "joined", "triton")
    for backend in backends[: 2 if triton_absent(sizes.device) else 3]:
        with kernels_by(backend):
            for name, errors in _cases(sizes, backend):
                found["cases"][f"{backend}: {name}"] = errors
                keep(found)
                free()
    return found | {"right": all(case["right"] for case in found["cases"].values())}


def _cases(sizes: Sizes, backend: Backend) -> Any:
    m, hidden, channels = sizes.tokens, sizes.hidden, sizes.channels
    for rank in sizes.ranks:
        for fixed, placement in _DECISIONS[:2] if sizes.toy else _DECISIONS:
            said = f"{'fixed' if fixed else 'numbers'}, {placement}, rank {rank}"
            options: dict[str, Any] = {"rank": rank, "fixed": fixed, "placement": placement}
            yield f"up, {said}", _linear(sizes, m, hidden, channels, "out_mask", **options)
            # Its backward's list stands on W's contiguous dimension.
            yield f"down, {said}", _linear(sizes, m, channels, hidden, "in_mask", **options)
    yield "MLP, numbers", _mlp(sizes)
    for kind in ("dense", "fixed", "numbers"):
        yield f"a step of two layers, {kind}", _step(sizes, kind, backend)


def _drawn(sizes: Sizes, *shape: int, seed: int) -> Tensor:
    draw = torch.Generator(device=sizes.device).manual_seed(seed)
    return torch.randn(*shape, generator=draw, device=sizes.device)


def _mask(sizes: Sizes, size: int, fixed: bool) -> Tensor:
    draw = torch.Generator(device=sizes.device).manual_seed(9)
    drawn = torch.rand(size, generator=draw, device=sizes.device)
    return drawn < sizes.kept if fixed else drawn


def _linear(
    sizes: Sizes, m: int, k: int, n: int, side: str, *, rank: int, fixed: bool, placement: str
) -> dict[str, Any]:
    """Output and every gradient of one layer, the mask's too where it has one."""
    given = {
        "x": _drawn(sizes, m, k, seed=0),
        "weight": _drawn(sizes, n, k, seed=1) / k**0.5,
        "lora_a": _drawn(sizes, rank, k, seed=2) / k**0.5,
        "lora_b": _drawn(sizes, n, rank, seed=3) * 0.1,
        side: _mask(sizes, n if side == "out_mask" else k, fixed),
    }
    dy = _drawn(sizes, m, n, seed=4)
    return _judged(
        sizes,
        given,
        lambda function, **inputs: function(**inputs, scaling=_SCALING, placement=placement),
        ours=masked_lora_linear,
        plain=reference.masked_lora_linear,
        dy=dy,
        frozen=("weight",),
    )


def _mlp(sizes: Sizes) -> dict[str, Any]:
    k, n, r = sizes.hidden, sizes.channels, sizes.rank
    given: dict[str, Tensor] = {"x": _drawn(sizes, sizes.tokens, k, seed=0)}
    for i, (name, rows, columns) in enumerate((("gate", n, k), ("up", n, k), ("down", k, n))):
        given[f"{name}_weight"] = _drawn(sizes, rows, columns, seed=10 + i) / columns**0.5
        given[f"{name}_a"] = _drawn(sizes, r, columns, seed=20 + i) / columns**0.5
        given[f"{name}_b"] = _drawn(sizes, rows, r, seed=30 + i) * 0.1
    given["mask"] = _mask(sizes, n, fixed=False)

    def call(function: Function, **t: Tensor) -> Tensor:
        layers = [
            LoraLayer(weight=t[f"{p}_weight"], lora_a=t[f"{p}_a"], lora_b=t[f"{p}_b"])
            for p in ("gate", "up", "down")
        ]
        return function(t["x"], *layers, t["mask"], scaling=_SCALING)

    return _judged(
        sizes, given, call, ours=masked_swiglu_mlp, plain=_plain_mlp,
        dy=_drawn(sizes, sizes.tokens, k, seed=4),
        frozen=("gate_weight", "up_weight", "down_weight"),
    )  # fmt: skip


def _plain_mlp(
    x: Tensor, gate: LoraLayer, up: LoraLayer, down: LoraLayer, mask: Tensor, *, scaling: float
) -> Tensor:
    def layer(z: Tensor, part: LoraLayer) -> Tensor:
        low_rank = F.linear(F.linear(z, part.lora_a), part.lora_b)
        return F.linear(z, part.weight) + scaling * low_rank

    return layer(F.silu(layer(x, gate)) * layer(x, up) * mask, down)


def _judged(
    sizes: Sizes,
    given: dict[str, Tensor],
    call: Callable[..., Tensor],
    *,
    ours: Function,
    plain: Function,
    dy: Tensor,
    frozen: tuple[str, ...],
) -> dict[str, Any]:
    """Both in the sizes' type against float64: y, and the gradient of all that is not frozen."""

    def results(function: Function, kind: torch.dtype) -> dict[str, Tensor]:
        inputs = {}
        for name, value in given.items():
            held = value if value.dtype == torch.bool else value.to(sizes.dtype).to(kind)
            learned = held.dtype != torch.bool and name not in frozen
            inputs[name] = held.detach().clone().requires_grad_(learned)
        y = call(function, **inputs)
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d {n}": g for n, g in zip(leaves, found, strict=True)}

    exact = results(plain, torch.float64)
    rounded = {"ours": results(ours, sizes.dtype), "plain": results(plain, sizes.dtype)}
    errors = {
        name: {which: _error(found[name], want) for which, found in rounded.items()}
        for name, want in exact.items()
    }
    least = _ROUNDINGS * torch.finfo(sizes.dtype).eps
    right = all(e["ours"] <= max(2 * e["plain"], least) for e in errors.values())
    return {"errors": errors, "right": right}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _step(sizes: Sizes, kind: str, backend: Backend) -> dict[str, Any]:
    """A step through two layers, loss and every gradient, over that in fp32 on torch's kernels."""
    model = llama_with_lora(sizes, layers=2, vocabulary=512, dtype=torch.float32)
    blocks = random_blocks(sizes, vocabulary=512)
    masks = None if kind == "dense" else random_masks(model, sizes, fixed=kind == "fixed")

    def results(by: Backend, *, rounded: bool) -> dict[str, Tensor]:
        narrowed = torch.autocast(sizes.device, dtype=sizes.dtype, enabled=rounded)
        with kernels_by(by), narrowed:
            set_decision(model, masks, "whole" if kind == "numbers" else "base")
            fuse_layers(model)
            loss = language_loss(model, blocks)
        leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach()} | dict(zip(leaves, found, strict=True))

    exact = results("torch", rounded=False)
    errors = {
        which: max(_norm_error(x, exact[name]) for name, x in results(by, rounded=True).items())
        for which, by in {"ours": backend, "plain": "torch"}.items()
    }
    least = _ROUNDINGS * torch.finfo(sizes.dtype).eps
    return {"errors": errors, "right": errors["ours"] <= max(3 * errors["plain"], least)}


def _norm_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
