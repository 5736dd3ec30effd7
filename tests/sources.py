"""Model folders as users bring them, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import tiny_model
from tests.tiny_tokenizers import tokenizer_of

WEIGHTS = "model.safetensors"


def save_source(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    config: dict[str, Any] | None = None,
    **sizes: Any,
) -> Path:
    """A tiny random model and its tokenizer, written by transformers; config: keys set in its
    config.json afterwards."""
    tokenizer = tokenizer or tokenizer_of("byte-level", bos=False)
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_model(family, tied=tied, **(own | sizes)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if config:
        edit(folder / "config.json", **config)
    return folder


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (found | values).items() if v is not None}))


def change(folder: Path, changed: Callable[[dict[str, Tensor]], object]) -> Path:
    """A source with its tensors changed in place."""
    tensors = load_file(folder / WEIGHTS)
    changed(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
