"""Least squares over many tokens: the gram of what a projection reads, and its damped solution."""

from __future__ import annotations

import torch
from torch import Tensor

# A gram is symmetric: what lies below its diagonal is not multiplied, but for blocks of so many.
_COLUMNS = 256


def gram_of(rows: Tensor) -> Tensor:
    """rows^T rows of rows [N, in]: [in, in]."""
    width = rows.shape[-1]
    gram = rows.new_empty(width, width)
    for start in range(0, width, _COLUMNS):
        some = slice(start, start + _COLUMNS)
        right = rows[:, some].T @ rows[:, start:]
        gram[some, start:], gram[start:, some] = right, right.T
    return gram


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
