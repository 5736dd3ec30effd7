"""Documents: what is read from a file, a folder or a built-in domain, a piece at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp_edge.data.domains import DOMAINS


@dataclass(frozen=True)
class Segment:
    """A piece of a document; `learn`: its tokens are predicted."""

    text: str
    learn: bool = True


@dataclass(frozen=True)
class Document:
    """Text that is split as one; `slice` is the kind of text it is, for figures by slice."""

    segments: tuple[Segment, ...]
    slice: str = "all"

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def load_documents(source: str, tokenizer: Any) -> list[Document]:
    """Documents of a built-in domain, or of a file or folder. Raises ValueError naming the trouble.

    JSONL: {"text"}, {"prompt", "completion"} or {"messages"} (through the tokenizer's chat
    template; loss on the answers). .txt and .md: documents are separated by two blank lines, or by
    one where there are no two. Also what `datasets` reads: csv, parquet, arrow, saved folders.
    """
    if source in DOMAINS:
        return [Document((Segment(text),), kind) for text, kind in DOMAINS[source]()]
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"data {source!r}: no such file; expected {', '.join(DOMAINS)}, or a .jsonl, .txt, "
            ".csv or .parquet file, or a folder of `datasets`"
        )
    if path.suffix in (".txt", ".md"):
        documents = _plain_text(path.read_text(encoding="utf-8"))
    else:
        documents = [_document(row, where, tokenizer) for where, row in _rows(path)]
    if not documents:
        raise ValueError(f"data {source!r} holds no text")
    return documents


def _plain_text(text: str) -> list[Document]:
    parts = re.split(r"\n\s*\n\s*\n", text)
    if len(parts) < 3:
        parts = re.split(r"\n\s*\n", text)
    return [Document((Segment(part.strip()),)) for part in parts if part.strip()]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file, or of what `datasets` reads."""
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not JSON ({error.msg}); expected one object a line"
                    ) from None
                yield f"{path}, line {number}", row
        return
    import datasets

    if path.is_dir() and (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
    else:
        kind = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
        if kind is None and path.is_file():
            raise ValueError(
                f"data {path}: unknown kind {path.suffix!r}; expected .jsonl, .txt, "
                ".md, .csv, .parquet, .arrow or a folder of `datasets`"
            )
        where = {"data_dir": str(path)} if kind is None else {"data_files": str(path)}
        loaded = datasets.load_dataset(kind or str(path), split="train", **where)
    for number, row in enumerate(loaded):
        yield f"{path}, row {number}", row


def _document(row: Any, where: str, tokenizer: Any) -> Document:
    keys = set(row) if isinstance(row, dict) else set()
    kind = str(row.get("slice", "all")) if keys else "all"
    if "messages" in keys:
        return Document(_chat(row["messages"], where, tokenizer), kind)
    if {"prompt", "completion"} <= keys:
        return Document((Segment(row["prompt"], False), Segment(row["completion"])), kind)
    if "text" in keys:
        return Document((Segment(row["text"]),), kind)
    raise ValueError(
        f"{where}: found the keys {sorted(keys)}; expected text, prompt and completion, or messages"
    )


def _chat(messages: list[dict[str, str]], where: str, tokenizer: Any) -> tuple[Segment, ...]:
    """The conversation by the tokenizer's chat template; only the assistant's turns are learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: messages need a chat template, and this tokenizer has none; "
            "give prompt and completion instead"
        )
    segments, done = [], ""
    for i, message in enumerate(messages):
        answer = message["role"] == "assistant"
        if answer:
            asked = tokenizer.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True
            )
            segments.append(Segment(asked[len(done) :], False))
            done = asked
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if text.startswith(done):
            segments.append(Segment(text[len(done) :], answer))
            done = text
    return tuple(s for s in segments if s.text)
