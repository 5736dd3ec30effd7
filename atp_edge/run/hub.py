"""Names of repositories on the Hugging Face Hub."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> str:
    """The name. Raises ValueError for what is no OWNER/NAME."""
    if not NAME.fullmatch(name):
        raise ValueError(f"push to {name!r}: expected OWNER/NAME of a model repository of the Hub")
    return name
