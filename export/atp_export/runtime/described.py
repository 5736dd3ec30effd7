"""What an exported folder says of itself: how long a text may be, and which tokens end one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = "genai_config.json"


@dataclass(frozen=True, kw_only=True)
class Described:
    """context: tokens at most, prompt and new ones (None: not said); ends: end tokens."""

    context: int | None = None
    ends: frozenset[int] = frozenset()


def described(folder: Path) -> Described:
    """From genai_config.json, where there is one. Raises ValueError for one of another form."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return Described()
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        ends = model.get("eos_token_id", [])
        return Described(
            context=model.get("context_length"),
            ends=frozenset(ends if isinstance(ends, list) else [ends]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no genai_config ({type(error).__name__}: {error}): export the model again"
        ) from error
