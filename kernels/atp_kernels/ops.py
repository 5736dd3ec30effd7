"""The one place that chooses between Triton and torch (`ATP_KERNELS=auto|triton|torch`)."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.reference import Placement

Backend = Literal["triton", "torch"]
logger = logging.getLogger(__name__)


@cache
def backend_name() -> Backend:
    """Which path runs, said once in the log. Raises ValueError for an unknown ATP_KERNELS."""
    asked = os.environ.get("ATP_KERNELS", "auto")
    if asked not in ("auto", "triton", "torch"):
        raise ValueError(f"ATP_KERNELS={asked!r}: expected auto, triton or torch")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    able = importlib.util.find_spec("triton") is not None and (
        torch.cuda.is_available() or interpreted
    )
    if asked == "triton" and not able:
        raise ValueError(
            "ATP_KERNELS=triton needs triton and a CUDA device (or TRITON_INTERPRET=1); "
            "found none: install atp-edge[gpu] on a machine with a GPU, or leave it at auto"
        )
    name: Backend = "triton" if able and asked != "torch" else "torch"
    logger.info("masked LoRA runs on %s", name)
    return name


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    scaling: float = 1.0,
    placement: Placement = "base",
) -> Tensor:
    """As `reference.masked_lora_linear`, by the fastest path that has all the gradients asked for.

    bool masks are a fixed decision: what they remove is skipped.
    """
    options: dict[str, Any] = {
        "bias": bias,
        "out_mask": out_mask,
        "in_mask": in_mask,
        "scaling": scaling,
        "placement": placement,
    }
    if backend_name() == "triton" and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return _triton(x, weight, lora_a, lora_b, options)
    masks = [mask for mask in (out_mask, in_mask) if mask is not None]
    if masks and all(mask.dtype == torch.bool for mask in masks):
        return reference.skipping_lora_linear(x, weight, lora_a, lora_b, **options)
    return reference.masked_lora_linear(x, weight, lora_a, lora_b, **options)


def _triton(x: Tensor, w: Tensor, a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias, out_mask, in_mask = options["bias"], options["out_mask"], options["in_mask"]
    scaling, placement = options["scaling"], options["placement"]
    y: Tensor = _TritonForward.apply(x, w, a, b, bias, out_mask, in_mask, scaling, placement)
    return y


class _TritonForward(torch.autograd.Function):
    """Triton forward; the backward differentiates the reference (its own kernel is to come)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        out_mask: Tensor | None,
        in_mask: Tensor | None,
        scaling: float,
        placement: Placement,
    ) -> Tensor:
        from atp_kernels import masked_lora

        ctx.save_for_backward(x, weight, lora_a, lora_b, bias, out_mask, in_mask)
        ctx.scaling, ctx.placement = scaling, placement
        return masked_lora.forward(
            x, weight, lora_a, lora_b, bias, out_mask, in_mask, scaling, placement == "whole"
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(saved)]
        with torch.enable_grad():
            # None stays None: an absent bias or mask.
            inputs: list[Any] = [
                t if t is None else t.detach().requires_grad_(bool(need))
                for t, need in zip(saved, needed, strict=True)
            ]
            x, weight, lora_a, lora_b, bias, out_mask, in_mask = inputs
            y = reference.masked_lora_linear(
                x,
                weight.to(x.dtype),
                lora_a.to(x.dtype),
                lora_b.to(x.dtype),
                bias=None if bias is None else bias.to(x.dtype),
                out_mask=out_mask,
                in_mask=in_mask,
                scaling=ctx.scaling,
                placement=ctx.placement,
            )
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, gradient))
        return *(next(found) if need else None for need in needed), None, None
