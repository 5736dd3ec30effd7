"""An exported folder on ONNX Runtime: `Session` loads it, `Generation` is one batch's cache.

`Generator` is text in, text out; `generate_tokens` and `stream_tokens` work on token ids.
"""

from atp_export.runtime.generation import Floats, Generation, Tokens
from atp_export.runtime.generator import (
    Generator,
    generate_tokens,
    perplexity,
    stream_tokens,
)
from atp_export.runtime.providers import usable_providers
from atp_export.runtime.sampling import Sampling, choose, cut
from atp_export.runtime.session import Session, usable_cores

__all__ = [
    "Floats",
    "Generation",
    "Generator",
    "Sampling",
    "Session",
    "Tokens",
    "choose",
    "cut",
    "generate_tokens",
    "perplexity",
    "stream_tokens",
    "usable_cores",
    "usable_providers",
]
