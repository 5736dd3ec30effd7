"""Names of repositories on the Hugging Face Hub, and the login to it."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> str:
    """The name. Raises ValueError for what is no OWNER/NAME."""
    if not NAME.fullmatch(name):
        raise ValueError(f"push to {name!r}: expected OWNER/NAME of a model repository of the Hub")
    return name


def check_login() -> None:
    """Raises ValueError where nobody is logged in to the Hub: a run is not pushed then, however
    long it took."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError("push: nobody is logged in to the Hub; `hf auth login`, or set HF_TOKEN")
