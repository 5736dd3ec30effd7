"""Cut tiny models of every family, of sizes that llama.cpp has a place for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from atp_export.gguf.proof import GgufProof, prove_gguf
from atp_export.gguf.tensors import GgufPrecision
from atp_export.gguf.write import write_gguf

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import Plan, plan_of
from tests.tiny import FAMILIES, NEW_FAMILIES, PLANS, tiny_model
from tests.tiny_tokenizers import CORPUS, tokenizer_of

CHECKS = {"weights", "ids", "ends", "greedy", "perplexity"}
"""All that a proof has where llama.cpp is at hand."""
SQUARE = {"head_dim": 8}
"""Six heads that make the hidden size of 48, where an architecture wants all heads."""
SIZES: dict[str, dict[str, Any]] = {
    "phi3": {"sliding_window": 64},
    "ministral": {"sliding_window": 64},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "olmo2": SQUARE,
    "olmo3": SQUARE,
    "exaone4": SQUARE | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
}
AS_LLAMA = ("llama", "llama-biases", "mistral", "qwen2", "phi3", "phi4-mini", "seed-oss",
            "ernie4_5", "ministral", "ministral3")  # fmt: skip
OWN = {"qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "smollm3": "smollm3",
       "olmo2": "olmo2", "olmo3": "olmo2", "granite": "granite", "exaone4": "exaone4",
       "glm4": "glm4", "hunyuan": "hunyuan-dense"}  # fmt: skip
CELLS = [(f, w) for f, w in itertools.product(FAMILIES | NEW_FAMILIES, PLANS)
         if f in AS_LLAMA or w == "uniform"]  # fmt: skip


def plan(model: Any, family: str, widths: str) -> Plan:
    """A KV group and four channels a layer, others in every one; all groups where they have to."""
    if "head_dim" not in SIZES.get(family, {}) and family != "smollm3":
        return PLANS[widths](model)
    shape = model_shape(model.config)
    groups = [(0, 1, 2)] * 4 if "head_dim" in SIZES[family] else [(0,), (2,), (1,), (0,)]
    channels = [(1, 2, 5, 39), (0, 3, 4, 7), (6, 8, 9, 10), (11, 12, 13, 14)]
    sites = [site for pair in zip(groups, channels, strict=True) for site in pair]
    return plan_of(shape, sites[: 2 * len(shape.layers)])


def slim(folder: Path, family: str, widths: str, kind: str = "byte-level", **sizes: Any) -> Any:
    """A cut tiny model on disk; its tokenizer."""
    tokenizer = tokenizer_of(kind)
    sizes = SIZES.get(family, {}) | sizes
    dense = tiny_model(family, tied=family != "olmo3", vocab_size=len(tokenizer), **sizes)
    save_narrow(narrow_model(dense, plan(dense, family, widths)), tokenizer, folder)
    return tokenizer


def proof_of(
    root: Path, family: str, widths: str, precision: GgufPrecision, node: Path | None,
    kind: str = "byte-level", **sizes: Any,
) -> GgufProof:  # fmt: skip
    """A model on disk as GGUF in llama.cpp, with real text."""
    tokenizer = slim(root / "slim", family, widths, kind, **sizes)
    file = write_gguf(root / "slim", root / "gguf", precision=precision, context=64)
    ids = tokenizer(" ".join(CORPUS))["input_ids"][:48]
    return prove_gguf(
        root / "slim", file, precision, tokenizer,
        prompts=["You may copy the", "Permission, in 2024:"], blocks=torch.tensor([ids]),
        node=node, new_tokens=24,
    )  # fmt: skip
