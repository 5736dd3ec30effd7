"""The whole of `atp-edge bench kernels`: layers, SwiGLU and attention of a model's sizes.

`atp-edge bench kernels --json FILE` writes these figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from atp_kernels import backend_name

from atp_bench.kernels.attention import AttentionCase, bench_attention
from atp_bench.kernels.dtypes import Dtype
from atp_bench.kernels.lora import LoraCase, bench_lora
from atp_bench.kernels.roofline import roofs
from atp_bench.kernels.swiglu import SwigluCase, bench_swiglu
from atp_edge.run.environment import environment

Sizes = Literal["small", "7b"]
# in_features, out_features
SHAPES: dict[Sizes, tuple[tuple[int, int], ...]] = {
    "small": ((576, 576), (576, 1536), (1536, 576)),
    "7b": ((4096, 4096), (4096, 11008), (4096, 14336), (11008, 4096)),
}
# of the same models' MLPs
CHANNELS: dict[Sizes, tuple[int, ...]] = {"small": (1536,), "7b": (11008, 14336)}
# heads, key and value heads, dimensions of a head
HEADS: dict[Sizes, tuple[int, int, int]] = {"small": (9, 3, 64), "7b": (32, 8, 128)}
KEPT = (1.0, 0.75, 0.6, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What is measured. Raises ValueError for settings out of range."""

    shapes: Sizes
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    kept: tuple[float, ...]
    dtype: Dtype
    rounds: int
    device: str
    compiled: bool

    def __post_init__(self) -> None:
        shares_fit = all(0 < share <= 1 for share in self.kept)
        if self.rounds < 1 or min(*self.tokens, *self.ranks) < 1 or not shares_fit:
            raise ValueError(
                f"rounds {self.rounds}, tokens {self.tokens}, ranks {self.ranks}, "
                f"kept {self.kept}: expected 1 or more, and shares above 0 and up to 1"
            )


def bench_kernels(
    settings: KernelSettings,
    *,
    progress: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every case. `keep` gets the figures after each of them: on a GPU there are many."""
    figures: dict[str, Any] = {
        "cases": [],
        "swiglu": [],
        "attention": [],
        "roofs": roofs(settings.dtype, settings.device),
        "backend": backend_name(),
        "gpu_figures": "measured" if settings.device == "cuda" else "not measured yet",
        "settings": {"rounds": settings.rounds, "dtype": settings.dtype,
                     "device": settings.device, "threads": torch.get_num_threads()},
        "environment": environment(),
    }  # fmt: skip
    for part, said, measure in _cases(settings):
        progress(said)
        figures[part].append(measure())
        keep(figures)
    return figures


def _cases(s: KernelSettings) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """The list a case belongs to, what to say of it, and how to measure it."""
    options: dict[str, Any] = {"rounds": s.rounds, "device": s.device, "compiled": s.compiled}
    for (k, n), rank, tokens, kept in product(SHAPES[s.shapes], s.ranks, s.tokens, s.kept):
        layer = LoraCase(
            in_features=k, out_features=n, rank=rank, tokens=tokens, kept=kept, dtype=s.dtype
        )
        said = f"{k} -> {n}, rank {rank}, {tokens} tokens, {kept:.0%} kept"
        yield "cases", said, partial(bench_lora, layer, **options)
    for channels, tokens in product(CHANNELS[s.shapes], s.tokens):
        mlp = SwigluCase(channels=channels, tokens=tokens, dtype=s.dtype)
        said = f"SwiGLU of {channels} channels, {tokens} tokens"
        yield "swiglu", said, partial(bench_swiglu, mlp, **options)
    heads, groups, size = HEADS[s.shapes]
    for tokens in s.tokens if s.device == "cpu" else ():
        attention = AttentionCase(
            heads=heads, groups=groups, size=size, tokens=tokens, dtype=s.dtype
        )
        said = f"attention of {heads} heads, {tokens} tokens"
        yield "attention", said, partial(bench_attention, attention, rounds=s.rounds)
