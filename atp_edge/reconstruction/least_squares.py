"""Least squares over many tokens: the gram of what a projection reads, and its damped solution."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_of(rows: Tensor) -> Tensor:
    """rows^T rows of rows [N, in] in fp32: [in, in].

    On a CPU numpy's, which sees that it is symmetric and multiplies a half of it; torch has no such
    product.
    """
    if rows.device.type != "cpu":
        return rows.T @ rows
    held = rows.numpy()
    return torch.from_numpy(held.T @ held)


def solve_damped(gram: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """gram^-1 wanted, `damping` of its mean diagonal added to the gram [n, n] in place.

    Raises FloatingPointError for a gram that is not finite: the model diverges on its text.
    """
    gram.diagonal().add_(damping * gram.diagonal().mean())
    # Symmetric and, by the damping, positive: Cholesky takes half of what LU would.
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed or not torch.isfinite(lower).all():
        raise FloatingPointError("what a projection reads is no longer finite")
    return torch.cholesky_solve(wanted, lower)
