"""The one reader: a built-in domain, a file or a folder as documents; bad rows named together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atp_edge.data.chat import Chat
from atp_edge.data.documents import Corpus, Document, Segment, SpecialTokens
from atp_edge.data.domains import DOMAINS
from atp_edge.data.encoding import NONCHARACTERS, check_tokenizer, matching, special_texts
from atp_edge.data.forms import Conversation, Pair, content_of
from atp_edge.data.rows import Row, rows_of

# Of many bad rows, so many are told.
_TOLD = 3
_SHARED = ("system", "developer")


def read_corpus(
    source: str,
    tokenizer: Any,
    *,
    special_tokens: SpecialTokens = "text",
    skip_bad_lines: bool = False,
    slice_by: str = "slice",
) -> Corpus:
    """Documents of a built-in domain, or of a file or folder; docs/data.md says what is read.

    special_tokens: what special-token text in the data means. skip_bad_lines: leave bad rows out
    and count them. slice_by: the field of a row that names its slice. Raises ValueError or OSError
    naming file, line, what is wrong and what to do.
    """
    check_tokenizer(tokenizer)
    if source in DOMAINS:
        return Corpus(documents=[Document((Segment(t),), kind) for t, kind in DOMAINS[source]()])
    path = Path(source)
    if not (path.is_file() or path.is_dir()):  # nor a pipe, which cannot be read twice
        raise ValueError(
            f"data {source!r}: no such file or folder; expected {', '.join(DOMAINS)}, a .jsonl, "
            ".json, .txt, .csv or .parquet file, or a folder of such"
        )
    build = _Builder(tokenizer, parse=special_tokens == "parse", slice_by=slice_by)
    documents: list[Document] = []
    bad: list[str] = []
    for row in rows_of(path):
        try:
            documents.append(build.document(row))
        except ValueError as error:
            bad.append(f"{row.place}: {error}")
    if bad and not skip_bad_lines:
        more = f"; and {len(bad) - _TOLD} more bad rows" if len(bad) > _TOLD else ""
        how = " (--dataset-skip-bad-lines leaves such rows out)"
        raise ValueError("; ".join(bad[:_TOLD]) + more + how)
    if not documents:
        why = f": all {len(bad)} rows are bad; {bad[0]}" if bad else ""
        raise ValueError(f"data {source!r} holds no text{why}")
    return Corpus(
        documents=documents,
        rows_skipped=len(bad),
        rows_with_special_tokens=build.with_special_tokens,
    )


class _Builder:
    """Rows to documents."""

    def __init__(self, tokenizer: Any, *, parse: bool, slice_by: str) -> None:
        self.slice_by = slice_by
        self.chat = Chat(tokenizer, parse)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.parse = parse
        self.special = matching(special_texts(tokenizer))
        self.with_special_tokens = 0

    def document(self, row: Row) -> Document:
        """Raises ValueError: what is wrong with the row and what to do."""
        if row.fault:
            raise ValueError(row.fault)
        try:
            content = content_of(row.value, chat_template=self.has_template)
            kind = _slice_of(row.value.get(self.slice_by))
            document = self._document(content, kind)
        except RecursionError:
            raise ValueError("nested too deeply; expected text, or a list of messages") from None
        self.with_special_tokens += bool(self.special.search(document.key))
        return document

    def _document(self, content: str | Pair | Conversation, kind: str) -> Document:
        match content:
            case str():
                check_characters(content + kind)
                return Document((Segment(content, parse=self.parse),), kind)
            case Pair():
                check_characters(content.prompt + content.completion + kind)
                prompt = Segment(content.prompt, learn=False, parse=self.parse)
                return Document((prompt, Segment(content.completion, parse=self.parse)), kind)
            case Conversation():
                written = json.dumps(
                    [content.messages, content.tools],
                    ensure_ascii=False,
                    sort_keys=True,
                    default=str,
                )
                check_characters(written + kind)
                # What rows share, a system prompt and tools, makes no near copies of them.
                own = [m["content"] for m in content.messages if m["role"] not in _SHARED]
                segments = self.chat.segments(content)
                return Document(segments, kind, written, "\n".join(own), rendered=True)


def _slice_of(value: object) -> str:
    """The name of a slice: `all` of rows without one. A value of that name is a slice of its own,
    in quotes; so is an empty one, to be seen, and what is in quotes already."""
    if value is None:
        return "all"
    name = str(value)
    return json.dumps(name) if name in ("", "all") or name.startswith('"') else name


def check_characters(text: str) -> None:
    """Raises ValueError for text that no file holds in UTF-8, or that stands for nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"holds half a character, the lone surrogate {half!a}; write the whole character, or "
            "take it out"
        ) from None
    found = NONCHARACTERS.search(text)
    if found:
        raise ValueError(f"holds U+{ord(found[0]):04X}, which stands for no character; remove it")
