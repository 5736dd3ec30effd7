"""Tokens that a tokenizer.json puts before and after every text by itself."""

from __future__ import annotations

from typing import Any


def put_around(tokenizer: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Their ids. Raises ValueError for a post-processor of which that is not known."""
    post = tokenizer["post_processor"] or {"type": "ByteLevel"}
    before: list[int] = []
    after: list[int] = []
    for step in post.get("processors", [post]):
        match step["type"]:
            case "ByteLevel":
                continue
            case "TemplateProcessing":
                ids = [_ids(item, step["special_tokens"]) for item in step["single"]]
                if ids.count(None) != 1:
                    raise ValueError(
                        f"its post-processor has {ids.count(None)} places for a text, expected one"
                    )
                at = ids.index(None)
                before = [i for token in ids[:at] for i in token or ()] + before
                after += [i for token in ids[at + 1 :] for i in token or ()]
            case kind:
                raise ValueError(f"its post-processor {kind} is none whose tokens are known")
    return before, after


def _ids(item: dict[str, Any], told: dict[str, Any]) -> list[int] | None:
    """Of an item of a template; None: the text stands there."""
    if "SpecialToken" not in item:
        return None
    name = item["SpecialToken"]["id"]
    if name not in told:
        raise ValueError(f"its post-processor puts {name!r}, which its special_tokens do not have")
    ids: list[int] = told[name]["ids"]
    return ids


def token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Of every token, by its text."""
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    return ids | added_ids(tokenizer)


def added_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Of those that no merge makes: they are found in the text before anything else."""
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """`bos_token` and its like in tokenizer_config.json, as text."""
    token = settings.get(name)
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text
