"""Documents: text in segments, told apart by who wrote it and whether it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SpecialTokens = Literal["text", "parse"]
"""Special-token text in data (`<|im_end|>` typed by someone): text, or the token itself."""


@dataclass(frozen=True)
class Segment:
    """A piece of a document.

    learn: its tokens are predicted. parse: special-token text in it means the tokens, as in what a
    chat template writes; in what a user wrote it is text.
    """

    text: str
    learn: bool = True
    parse: bool = False


@dataclass(frozen=True)
class Document:
    """Text that is split as one.

    slice: the kind of text it is, for figures by slice. written: what the user wrote, by which
    splits are drawn, so that a template which prints the date moves nothing; by default the text.
    words: what near copies are told by; by default `written`. rendered: by a chat template, which
    has written what begins and ends it.
    """

    segments: tuple[Segment, ...]
    slice: str = "all"
    written: str = ""
    words: str = ""
    rendered: bool = False

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def key(self) -> str:
        return self.written or self.text

    @property
    def compared(self) -> str:
        return self.words or self.key


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What was read of a source.

    rows_skipped: bad rows left out, as asked for. rows_with_special_tokens: rows in which someone
    wrote a special token's text.
    """

    documents: list[Document]
    rows_skipped: int = 0
    rows_with_special_tokens: int = 0
