"""Tokens that a tokenizer.json puts before and after every text by itself."""

from __future__ import annotations

from typing import Any


def put_around(tokenizer: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Their ids. Raises ValueError for a post-processor of which that is not known."""
    post = tokenizer.get("post_processor") or {"type": "ByteLevel"}
    before: list[int] = []
    after: list[int] = []
    for step in post.get("processors", [post]):
        match step["type"]:
            case "ByteLevel":
                continue
            case "TemplateProcessing":
                told = step["special_tokens"]
                ids = [told[x["SpecialToken"]["id"]]["ids"] if "SpecialToken" in x else None
                       for x in step["single"]]  # fmt: skip
                at = ids.index(None)
                before = [i for token in ids[:at] for i in token or ()] + before
                after += [i for token in ids[at + 1 :] for i in token or ()]
            case kind:
                raise ValueError(f"its post-processor {kind} is none whose tokens are known")
    return before, after


def token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Of every token, by its text."""
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    return ids | added


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """`bos_token` and its like in tokenizer_config.json, as text."""
    token = settings.get(name)
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text
