"""One projection with LoRA, forward and backward: ours against what else one would write.

Every rival's result is held to float64 first (`error`), over the largest exact value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atp_bench.acceptance.backend import kernels_by, triton_absent
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import free, timed
from atp_bench.kernels.dtypes import TOLERANCE
from atp_bench.kernels.lora import (
    Inputs,
    Layer,
    LoraCase,
    addmm,
    error_of,
    make_inputs,
    ours,
    ours_joined,
    ours_narrow,
    peft,
    sliced,
)

REFERENCE = "peft, bf16, no mask"
"""What the others are over."""


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Milliseconds and ratios to `REFERENCE` by case and rival."""
    cases: list[dict[str, Any]] = []
    shapes = ((sizes.hidden, sizes.channels), (sizes.channels, sizes.hidden))
    for (k, n), rank, kept in (
        (shape, rank, kept) for shape in shapes for rank in sizes.ranks for kept in (1.0, 0.6)
    ):
        case = LoraCase(
            in_features=k, out_features=n, rank=rank, tokens=sizes.tokens, kept=kept, dtype="bf16"
        )
        cases.append(_case(case, sizes))
        keep({"cases": cases})
        free()
    return {"cases": cases, "triton": triton_absent(sizes.device) or "measured"}


def _case(case: LoraCase, sizes: Sizes) -> dict[str, Any]:
    made = make_inputs(case, sizes.device)
    all_kept = replace(made, mask=torch.ones_like(made.mask))
    compiler = "eager" if sizes.toy else "inductor"  # A toy's compilation would take most of it.
    rivals: dict[str, tuple[Layer, Inputs]] = {
        REFERENCE: (peft(all_kept, made.x.dtype, masked=False), all_kept),
        "peft, bf16, then the mask": (peft(made, made.x.dtype), made),
        "peft, fp32 adapters, then the mask": (peft(made, torch.float32), made),
        "addmm, then the mask": (addmm(made), made),
        "addmm, torch.compile": (torch.compile(addmm(made), backend=compiler), made),
        "weights sliced, LoRA": (sliced(made), made),
        "ours, narrow": (_by("torch", ours_narrow(made)), made),
        "ours, joined": (ours_joined(made), made),
    }
    if triton_absent(sizes.device) is None:
        rivals["ours, Triton"] = (_by("triton", ours(made)), made)
    errors = {name: error_of(layer, inputs) for name, (layer, inputs) in rivals.items()}
    actions = {name: _forward_backward(*rival) for name, rival in rivals.items()}
    bare = "weights sliced, no LoRA (the ceiling)"
    actions[bare] = _forward_backward(_product_alone(made), made)
    rows = timed(actions, device=sizes.device, rounds=sizes.rounds)
    for name, row in rows.items():
        row["over"] = rows[REFERENCE]["ms"] / row["ms"]
        if name != bare:
            row |= {"error": errors[name], "right": errors[name] <= TOLERANCE[case.dtype]}
    return {"in": case.in_features, "out": case.out_features, "rank": case.rank,
            "kept": case.kept, "tokens": case.tokens, "rows": rows}  # fmt: skip


def _by(backend: Any, layer: Layer) -> Layer:
    """The layer on one backend: its backward asks nothing anew."""

    def run(x: Tensor) -> Tensor:
        with kernels_by(backend):
            return layer(x)

    return run


def _product_alone(made: Inputs) -> Layer:
    weight = made.layer.weight[made.mask.nonzero().squeeze(1)].contiguous()
    return lambda x: F.linear(x, weight)


def _forward_backward(layer: Layer, made: Inputs) -> Callable[[], None]:
    """A run of y, then the gradients of x and of all that the layer learns."""
    leaves = _learned(layer(made.x))
    narrow = layer(made.x).shape != made.dy.shape

    def run() -> None:
        torch.autograd.grad(layer(made.x), leaves, made.narrow_dy if narrow else made.dy)

    return run


def _learned(y: Tensor) -> list[Tensor]:
    """All leaves whose gradients y brings: peft has factors of its own."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    left = [y.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [before for before, _ in node.next_functions]
    return found
