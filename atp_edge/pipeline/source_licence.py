"""The licence of the model that a run began with, as its folder states it."""

from __future__ import annotations

import itertools
from pathlib import Path


def licence_of(checkpoint: Path) -> str:
    """Its card's `license:`, or a file's name."""
    card = checkpoint / "README.md"
    # A card in another encoding than UTF-8 still says its licence in ASCII.
    lines = card.read_text("utf-8", "replace").splitlines() if card.exists() else []
    named = (x.partition(":")[2].strip() for x in lines if x.startswith("license:"))
    files = (path.name for path in sorted(checkpoint.glob("LICENSE*")))
    return next(itertools.chain(named, files), "not stated by the source folder")
