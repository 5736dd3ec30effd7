"""What makes training on a CPU faster than torch's defaults do."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atp_kernels import causal_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atp_edge.model.attention import CAUSAL

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OF_A_STEP, _OF_A_PASS = 2**30, 2**21  # bytes from which a freed buffer goes back at once


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one; returns whether it could be asked to.

    By default it gives every buffer above 32 MB back to the kernel, which clears each page anew: of
    a LoRA step of SmolLM2-135M on 512 tokens that was 28 % (2.30 -> 1.65 s, 2 cores of an EPYC).
    """
    libc = _glibc()
    largest = 2**31 - 1
    return bool(
        libc
        and libc.mallopt(_M_MMAP_THRESHOLD, _OF_A_STEP)
        and libc.mallopt(_M_TRIM_THRESHOLD, largest)
    )


def give_back_freed_memory() -> None:
    """Hand what is free of glibc's heap back to the kernel: what comes next needs other sizes."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def stop_keeping_freed_memory() -> None:
    """After the last step: what is freed goes back to the kernel again."""
    give_back_freed_memory()
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _OF_A_PASS)


@contextmanager
def giving_back_freed_memory(device: str) -> Iterator[None]:
    """On a CPU: let glibc give back what a pass over much text frees, then keep again what steps
    free. Elsewhere nothing is kept (`accelerate` asks for it on a CPU alone), and nothing changes.

    A pass frees buffers of many sizes, none of which a step needs: were they kept, a run of
    SmolLM2-135M held 14.8 GB from a pass over 64 blocks of 512 tokens on, in place of 7.0 in it.
    """
    libc = _glibc()
    if device != "cpu" or libc is None:
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _OF_A_PASS)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, _OF_A_STEP)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def attention_implementation(device: str) -> str:
    """transformers' name of the attention to train with: on a CPU `causal_attention`'s."""
    if device != "cpu":
        return "sdpa"
    AttentionInterface.register(CAUSAL, _attention)
    AttentionMaskInterface.register(CAUSAL, sdpa_mask)
    return CAUSAL


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [B, H, T, D] -> [B, T, H, D].

    What is not plain causal attention (padding, a window, a cache, dropout) is torch's fused one.
    """
    if attention_mask is None and not dropout and query.shape[2] == key.shape[2] > 1:
        out = causal_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
