"""GPTQ (arXiv 2210.17323): a matrix rounded row by row, each row's error made good by later rows.

Our own lines, for onnxruntime 1.31's `gptq` runs but does not do it: it takes a column where the
method has a row of the triangular factor, so that no error is ever handed on, and its result is
that of rounding to the nearest (docs/research/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the gram's mean diagonal, as in the paper (section 3.3).
DAMPING = 0.01
COLUMNS = 8192
MOST_MOVED = {4: 0.5, 8: 0.1}
"""How far an output's row is moved at most, over its length, by bits. Measured: 0.30 and 0.04 on
SmolLM2-135M by 32 blocks of text; 0.72 where the calibration text was shorter than the matrix is
wide, for what no calibration input holds costs nothing there and is lost on other text."""


def gptq(matrix: Tensor, gram: Tensor, *, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Levels uint8 [K, N] (their middle means 0) and scales fp32 [blocks, N] of a matrix [K, N].

    gram: X^T X [K, K] of calibration inputs, weighted or not. A block's scale is set when its first
    row's turn comes: its weight of largest magnitude is the level 0 exactly, as onnxruntime's
    symmetric quantizer has it. An output that would move by more than MOST_MOVED is rounded to the
    nearest instead. Raises ValueError for a gram that is not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("calibration gave inputs that are not finite: the model diverges on them")
    factor = _factor(gram)
    # Columns are rounded apart from one another; a vocabulary's all at once would take gigabytes.
    parts = [_held(part, factor, bits, block) for part in matrix.split(COLUMNS, dim=1)]
    levels, scales = (torch.cat(of, dim=1) for of in zip(*parts, strict=True))
    return levels, scales


def _held(matrix: Tensor, factor: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    levels, scales = _rounded(matrix, factor, bits, block)
    middle = 2 ** (bits - 1)
    rows = scales.repeat_interleave(block, dim=0)[: len(matrix)]
    moved = ((levels.float() - middle) * rows - matrix.float()).norm(dim=0)
    far = moved > MOST_MOVED[bits] * matrix.float().norm(dim=0)
    if far.any():
        levels[:, far], scales[:, far] = _nearest(matrix[:, far].double(), middle, block)
    return levels, scales


def _nearest(matrix: Tensor, middle: int, block: int) -> tuple[Tensor, Tensor]:
    blocks = matrix.split(block)
    scales = [_scales(part, middle) for part in blocks]
    levels = [
        ((part / scale).round().clamp(-middle, middle - 1) + middle).to(torch.uint8)
        for part, scale in zip(blocks, scales, strict=True)
    ]
    return torch.cat(levels), torch.stack(scales).float()


def _rounded(matrix: Tensor, factor: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    rows, middle = len(matrix), 2 ** (bits - 1)
    left = matrix.double().clone()
    levels = torch.empty(matrix.shape, dtype=torch.uint8)
    scales = []
    for start in range(0, rows, block):
        end = min(start + block, rows)
        scale = _scales(left[start:end], middle)
        errors = torch.empty(end - start, matrix.shape[1], dtype=torch.float64)
        for i in range(start, end):
            level = (left[i] / scale).round().clamp(-middle, middle - 1)
            levels[i] = (level + middle).to(torch.uint8)
            errors[i - start] = (left[i] - level * scale) / factor[i, i]
            left[i:end] -= factor[i, i:end, None] * errors[i - start]
        left[end:] -= factor[start:end, end:].T @ errors
        scales.append(scale)
    return levels, torch.stack(scales).float()


def _factor(gram: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (gram + damping)^-1."""
    damped = gram.double().clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _scales(weights: Tensor, middle: int) -> Tensor:
    """[N], fp32 values, of a block's weights [rows, N]: the largest magnitude becomes -middle."""
    extreme = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0]
    scale = (extreme / -middle).float().double()
    return torch.where(scale == 0, torch.ones_like(scale), scale)
