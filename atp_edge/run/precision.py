"""What training computes in, where it was not said."""

from __future__ import annotations

import platform
from typing import Literal

import torch

from atp_edge.config import Config
from atp_edge.settings import with_values

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What `train.precision` computes in; no entry: fp32."""

_STORED = ("bf16", "nf4")
"""`train.base_dtype` of weights that are computed in bf16 alone."""


def precision_of(config: Config, device: str | None = None) -> Literal["bf16", "fp16", "no"]:
    """`train.precision`, and what `auto` is on a device (cuda, cpu; by default the one at hand):
    bf16, but fp32 on a CPU that has no products of it, unless the weights are kept in it.
    """
    asked = config.train.precision
    if asked != "auto":
        return asked
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stored = config.train.base_dtype in _STORED
    return "bf16" if kind != "cpu" or stored or cpu_computes_bf16() else "no"


def settled(config: Config, device: str | None = None) -> Config:
    """`auto` written down as what it means, so that a run gone on with elsewhere does the same."""
    return with_values(config, {"train.precision": precision_of(config, device)})


def what_is_slow(config: Config, device: str) -> str | None:
    """A sentence on a precision that a CPU has no products of, or that was taken for want of one;
    config: settled. None: there is nothing to say."""
    if device != "cpu" or cpu_computes_bf16():
        return None
    if config.train.precision == "no":
        return "in fp32: this CPU has no products of bf16 (AVX512-BF16 or AMX)"
    kept = " --train-base-dtype auto" if config.train.base_dtype in _STORED else ""
    return (
        f"train.precision = {config.train.precision!r}: this CPU has no products of it, so a step "
        f"takes about 15 times as long as in fp32; a new run takes --train-precision no{kept}"
    )


def cpu_computes_bf16() -> bool:
    """Whether this CPU has products of bf16: AVX512-BF16 or AMX, or what oneDNN asks of an ARM.

    Where it has none, torch widens every number by itself: 576 x 1536 weights and 512 tokens took
    700 ms forward and backward where fp32 takes 47 (an EPYC with AVX2 alone).
    """
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
