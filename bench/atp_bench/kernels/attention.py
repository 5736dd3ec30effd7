"""Causal attention and its gradients on a CPU, against transformers' eager one and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from atp_kernels import causal_attention
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import eager_attention_forward

from atp_bench.kernels.dtypes import TOLERANCE, TORCH, Dtype
from atp_bench.kernels.forward_backward import Times, clocked, compared, largest_error

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """q [1, heads, tokens, size], k and v [1, groups, tokens, size] in a type."""

    heads: int
    groups: int
    size: int
    tokens: int
    dtype: Dtype

    @property
    def flops(self) -> float:
        """Two products forward and five backward, over the half that a causal mask leaves."""
        return 7.0 * self.heads * self.tokens**2 * self.size


def _rivals(case: AttentionCase) -> dict[str, Attention]:
    """Eager attention first: the others are over it."""
    module: Any = SimpleNamespace(num_key_value_groups=case.heads // case.groups, training=True)
    # In fp32 as a model under autocast has it, whose embeddings are.
    mask = torch.full((1, 1, case.tokens, case.tokens), torch.finfo(torch.float32).min).triu(1)
    scale = case.size**-0.5

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = eager_attention_forward(module, q, k, v, mask, scale)[0]
        return out.transpose(1, 2)

    fused = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return {
        "transformers, eager": eager,
        "torch, fused": fused,
        "ours": partial(causal_attention, scale=scale),
    }


def _error(rival: Attention, made: list[Tensor], dy: Tensor) -> float:
    """The largest error of the output, dq, dk and dv against float64."""

    def results(attention: Attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = attention(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    exact = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    wide = [t.double() for t in made]
    return largest_error(results(rival, made, dy), results(exact, wide, dy.double()))


def bench_attention(case: AttentionCase, *, rounds: int) -> dict[str, Any]:
    """Every rival of one case."""
    draw = torch.Generator().manual_seed(0)
    kind = TORCH[case.dtype]
    counts = (case.heads, case.groups, case.groups, case.heads)
    *made, dy = (torch.randn(1, n, case.tokens, case.size, generator=draw).to(kind) for n in counts)

    def times(rival: Attention) -> Times:
        inputs = [t.clone().requires_grad_() for t in made]
        return clocked(lambda: (rival(*inputs), dy))

    rows = compared(
        _rivals(case),
        times=times,
        error=lambda rival: _error(rival, made, dy),
        rounds=rounds,
        tolerance=TOLERANCE[case.dtype],
        flops=case.flops,
    )
    return {"case": asdict(case), "rows": rows}
