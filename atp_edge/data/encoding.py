"""Text to token ids: the one place that says what training, scoring and generation read.

A text gets what its tokenizer puts around it (BOS, EOS), once; a rendered conversation has what its
template writes and nothing else. A document ends with the end token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from atp_edge.data.documents import Document, Segment

IGNORED = -100
"""The label of a token that is not learned."""
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
"""Code points that stand for no character, ever; marks are made of them."""
_OPEN, _CLOSE, _BREAK = "\ufdd4", "\ufdd5", "\ufdd6"
_CHARACTERS = 2**20
"""Of documents that are encoded together, at least."""

Segments = Sequence[Segment]
Encoded = tuple[list[int], list[int]]
"""Ids, and their labels."""


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special and token.content]


def matching(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest where several begin together, as tokenizers do."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text: BOS, EOS or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def prompt_ids(tokenizer: Any, text: str, *, rendered: bool = False) -> list[int]:
    """Ids of a text to go on from: BOS as the tokenizer has it, once, and no EOS.

    rendered: by a chat template, which has written its own.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    before, _ = added_around(tokenizer)
    return ids if rendered or ids[: len(before)] == before else before + ids


def document_start(tokenizer: Any) -> list[int]:
    """What stands before the first token of a document in training: BOS, or the end token of the
    document before it."""
    before, _ = added_around(tokenizer)
    return before or [tokenizer.eos_token_id]


def check_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> None:
    """Raises ValueError for a tokenizer without an end token, or with ids beyond the model's
    embeddings (`vocabulary` rows)."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, which ends every document; name it in "
            "tokenizer_config.json"
        )
    if vocabulary is None:
        return
    beyond = {i: text for text, i in tokenizer.get_vocab().items() if i >= vocabulary}
    if beyond:
        first = min(beyond)
        raise ValueError(
            f"token {beyond[first]!r} has the id {first} and the model's embeddings have "
            f"{vocabulary} rows ({len(beyond)} such tokens); resize them "
            "(model.resize_token_embeddings(len(tokenizer))) or take the tokens out"
        )


@dataclass(frozen=True)
class Encoder:
    """Documents as ids and labels."""

    tokenizer: Any

    def encode(self, document: Document) -> Encoded:
        """(ids, labels) of a document with all that begins and ends it; labels are `IGNORED` where
        nothing is learned. Raises ValueError for a tokenizer that cannot tell characters apart."""
        (one,) = self.encode_all([document])
        return one

    def encode_all(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The same of each, many at a time: a fast tokenizer spreads them over the cores. Documents
        are taken as they are wanted, and those of about a million characters together."""
        for some in _together(documents):
            plain = iter(self._texts([d.segments for d in some if not d.rendered]))
            rendered = iter(self._rendered([d.segments for d in some if d.rendered]))
            for document in some:
                yield self._whole(document, *next(rendered if document.rendered else plain))

    def _whole(self, document: Document, ids: list[int], labels: list[int]) -> Encoded:
        """A document's own text with all that begins and ends it."""
        before, after = ([], []) if document.rendered else self._around
        if ids[: len(before)] == before:
            before = []
        last = next((s for s in document.segments[::-1] if s.text.strip()), document.segments[-1])
        if last.parse and last.text.rstrip().endswith(self._special):
            after = []
        elif not after:
            after = [self.tokenizer.eos_token_id]
        learned = after if last.learn else [IGNORED] * len(after)
        return before + ids + after, [IGNORED] * len(before) + labels + learned

    def rendered(self, segments: Segments) -> list[int]:
        """Ids of what a chat template has written."""
        ((ids, _),) = self._rendered([segments])
        return ids

    def context(self, text: str) -> list[int]:
        """Ids of a text that starts a document, after what stands before it in training."""
        ((ids, _),) = self._texts([(Segment(text),)])
        return self._start + ids

    def continued(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context, continuation) as ids, as in training on a prompt and its completion."""
        ((ids, labels),) = self._texts([(Segment(text, learn=False), Segment(continuation))])
        given = labels.count(IGNORED)
        return self._start + ids[:given], ids[given:]

    @cached_property
    def _start(self) -> list[int]:
        return document_start(self.tokenizer)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        return added_around(self.tokenizer)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(special_texts(self.tokenizer))

    @cached_property
    def _marked(self) -> _Marked:
        return _Marked(self.tokenizer)

    def _rendered(self, documents: Sequence[Segments]) -> list[Encoded]:
        return self._marked.encode(documents) if documents else []

    def _texts(self, documents: Sequence[Segments]) -> list[Encoded]:
        """Texts, or prompts and their completions: a prompt's ids are those it has alone, as when
        the model is asked, whatever would merge over its end."""
        begun = [
            list(zip(accumulate(s.text for s in segments), segments, strict=True))
            for segments in documents
        ]
        read = self._read({(text, s.parse) for one in begun for text, s in one})
        found = []
        for one in begun:
            ids, labels = list[int](), list[int]()
            for text, segment in one:
                whole = read[text, segment.parse]
                joins = whole[: len(ids)] == ids
                rest = whole[len(ids) :] if joins else self._marked.rest(segment)
                ids = ids + rest
                labels += rest if segment.learn else [IGNORED] * len(rest)
            found.append((ids, labels))
        return found

    def _read(self, asked: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
        """Ids of texts, each with whether special-token text in it means the tokens."""
        texts: dict[bool, list[str]] = {}
        for text, parse in asked:
            texts.setdefault(parse, []).append(text)
        found = {}
        for parse, some in texts.items():
            ids = self.tokenizer(some, add_special_tokens=False, split_special_tokens=not parse)
            for text, row in zip(some, ids["input_ids"], strict=True):
                found[text, parse] = row
        return found


def _together(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in turn, so many at a time that they have `_CHARACTERS`, or are the last."""
    some: list[Document] = []
    characters = 0
    for document in documents:
        some.append(document)
        characters += len(document.text)
        if characters >= _CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


class _Marked:
    """A copy of a tokenizer that reads special-token text as text, and marks as special tokens.

    A mark has the flags of the token that it stands for, so the rest of the text is encoded as it
    would be beside that token.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import AddedToken, Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "prompts and conversations need a tokenizer that tells the characters of its "
                "tokens, one with a tokenizer.json; give documents as text"
            )
        added = tokenizer.added_tokens_decoder
        special = {i: token for i, token in added.items() if token.special and token.content}
        marks = {i: f"{_OPEN}{i}{_CLOSE}" for i in special}
        self.tokens = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokens.no_truncation()
        self.tokens.no_padding()
        self.tokens.encode_special_tokens = True
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        alike = {i: {flag: getattr(token, flag) for flag in flags} for i, token in special.items()}
        self.tokens.add_tokens(
            [AddedToken(_BREAK, normalized=False)]
            + [AddedToken(mark, **alike[i]) for i, mark in marks.items()]
        )
        self.real = {self.tokens.token_to_id(mark): i for i, mark in marks.items()}
        self.mark_of = {token.content: marks[i] for i, token in special.items()}
        self.special = matching(self.mark_of)

    def rest(self, segment: Segment) -> list[int]:
        """Ids of a segment that does not begin its text: after a line end, for some tokenizers put
        a space before a text, and before what follows a mark; after a mark where the line end would
        merge with it."""
        text = self._text(segment)
        for before in ("\n", _BREAK):
            start = self.tokens.encode(before, add_special_tokens=False).ids
            ids = self.tokens.encode(before + text, add_special_tokens=False).ids
            if ids[: len(start)] == start:
                break
        return [self.real.get(i, i) for i in ids[len(start) :]]

    def encode(self, documents: Sequence[Segments]) -> list[Encoded]:
        """(ids, labels) of documents' segments, those of each encoded together; a token is learned
        that has a character of a learned segment."""
        pieces = [[self._text(segment) for segment in segments] for segments in documents]
        encoded = self.tokens.encode_batch(list(map("".join, pieces)), add_special_tokens=False)
        return [
            self._labelled(one, segments, texts)
            for one, segments, texts in zip(encoded, documents, pieces, strict=True)
        ]

    def _labelled(self, encoded: Any, segments: Segments, pieces: Sequence[str]) -> Encoded:
        learned = b"".join(
            bytes([segment.learn]) * len(piece)
            for segment, piece in zip(segments, pieces, strict=True)
        )
        ids = [self.real.get(i, i) for i in encoded.ids]
        # A token of no character of its own (a space put before the text) goes with the next one.
        spans = ((start, max(end, start + 1)) for start, end in encoded.offsets)
        labels = [
            i if any(learned[start:end]) else IGNORED
            for i, (start, end) in zip(ids, spans, strict=True)
        ]
        return ids, labels

    def _text(self, segment: Segment) -> str:
        if not segment.parse:
            return segment.text
        return self.special.sub(lambda found: self.mark_of[found[0]], segment.text)
