"""Text to token ids: the one place that says what training, scoring and generation read.

A text gets what its tokenizer puts around it (BOS, EOS), once; a rendered conversation has what its
template writes and nothing else. A document ends with the end token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from atp_edge.data.documents import Document, Segment

IGNORED = -100
"""The label of a token that is not learned."""
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
"""Code points that stand for no character, ever; marks are made of them."""
_OPEN, _CLOSE, _BREAK = "\ufdd4", "\ufdd5", "\ufdd6"


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

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """(ids, labels) of a document with all that begins and ends it; labels are `IGNORED` where
        nothing is learned. Raises ValueError for a tokenizer that cannot tell characters apart."""
        encode = self._marked.encode if document.rendered else self._texts
        ids, labels = encode(document.segments)
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

    def rendered(self, segments: tuple[Segment, ...]) -> list[int]:
        """Ids of what a chat template has written."""
        return self._marked.encode(segments)[0]

    def context(self, text: str) -> list[int]:
        """Ids of a text that starts a document, after what stands before it in training."""
        return self._start + self._texts((Segment(text),))[0]

    def continued(self, text: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context, continuation) as ids, as in training on a prompt and its completion."""
        ids, labels = self._texts((Segment(text, learn=False), Segment(continuation)))
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

    def _texts(self, segments: tuple[Segment, ...]) -> tuple[list[int], list[int]]:
        """A text, or a prompt and its completion: the prompt's ids are those it has alone, as when
        the model is asked, whatever would merge over its end."""
        text, ids, labels = "", list[int](), list[int]()
        for segment in segments:
            text += segment.text
            whole = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=not segment.parse
            )["input_ids"]
            joins = whole[: len(ids)] == ids
            rest = whole[len(ids) :] if joins else self._marked.rest(segment)
            ids = ids + rest
            labels += rest if segment.learn else [IGNORED] * len(rest)
        return ids, labels


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

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """(ids, labels) of segments encoded together; a token is learned that has a character of a
        learned segment."""
        pieces = [self._text(segment) for segment in segments]
        learned = b"".join(
            bytes([segment.learn]) * len(piece)
            for segment, piece in zip(segments, pieces, strict=True)
        )
        encoded = self.tokens.encode("".join(pieces), add_special_tokens=False)
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
