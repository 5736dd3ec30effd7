"""The attention of blocks that are whole: every token sees all before it, and nothing is padded.

transformers looks at every forward pass whether positions are those of several texts in one row,
which waits for a GPU. Under a name that no mask belongs to, it makes none and asks nothing; the
attention functions are then causal by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAUSAL = "atp_causal"
"""transformers' name of the attention that trains on a CPU (`atp_edge.training.cpu`)."""
_CAUSAL_BY_THEMSELVES = ("sdpa", CAUSAL)
_SUFFIX = "_of_whole_blocks"


@contextmanager
def whole_blocks(config: Any, tokens: int) -> Iterator[None]:
    """Forward passes inside are of whole blocks of so many tokens.

    Nothing changes for other attention than torch's fused one and our own (eager adds the mask),
    nor where a layer's window is shorter than the blocks.
    """
    name = config._attn_implementation
    if name not in _CAUSAL_BY_THEMSELVES or _windowed(config, tokens):
        yield
        return
    if name + _SUFFIX not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name + _SUFFIX, ALL_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = name + _SUFFIX
    try:
        yield
    finally:
        config._attn_implementation = name


def _windowed(config: Any, tokens: int) -> bool:
    """Whether any layer may see less than a block. Asked at every pass: of the configuration alone,
    where every family here has its window."""
    window = getattr(config, "sliding_window", None)
    return window is not None and window < tokens
