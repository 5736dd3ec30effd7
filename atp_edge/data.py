"""Domain text -> token blocks in three splits that share no document.

Splits are drawn by document from a hash of the seed and the text, so that they depend on neither
order nor run; a document of the decision or test split that nearly repeats one of another split is
taken out and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_edge.domains import DOMAINS

SPLITS = ("train", "decision", "test")
# A document of which this share of 8-word shingles also occurs in another split is a near copy.
NEAR_DUPLICATE_SHARE = 0.5
# Packed of a split where there is so much, however short the run: their order is then the same.
ENOUGH_BLOCKS = 4096
VALIDATION_BLOCKS = 8
_SHINGLE_WORDS = 8
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


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


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Token blocks: input_ids and labels [N, T]; labels are -100 where nothing is learned."""

    input_ids: Tensor
    labels: Tensor

    def rows(self, index: list[int] | Tensor) -> Blocks:
        return Blocks(input_ids=self.input_ids[index], labels=self.labels[index])

    def first(self, count: int) -> Blocks:
        return Blocks(input_ids=self.input_ids[:count], labels=self.labels[:count])

    def spread(self, count: int) -> Blocks:
        """`count` blocks evenly spaced over all (all, if they are fewer): neighbours are often of
        one document."""
        total = len(self.input_ids)
        return self.rows(torch.linspace(0, total - 1, min(count, total)).round().long())

    def to(self, device: torch.device | str) -> Blocks:
        return Blocks(input_ids=self.input_ids.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What the splits hold."""

    documents: dict[str, int]
    tokens: dict[str, int]
    duplicates_removed: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Train, decision and test blocks, disjoint by document."""

    train: Blocks
    decision: Blocks
    test: Blocks
    report: SplitReport

    @property
    def validation(self) -> Blocks:
        """The blocks that tuning is validated on as it goes."""
        return self.decision.spread(VALIDATION_BLOCKS)


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


def split_documents(
    documents: list[Document],
    *,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
) -> dict[str, list[Document]]:
    """Documents of train, decision and test: drawn by hash, near copies of earlier splits out."""
    if not 0 < decision_share + test_share < 1 or min(decision_share, test_share) <= 0:
        raise ValueError(
            f"decision share {decision_share} and test share {test_share}: expected both above 0 "
            "and their sum below 1"
        )
    drawn: dict[str, list[Document]] = {name: [] for name in SPLITS}
    ordered = sorted(documents, key=lambda d: _draw(d, seed))
    for document in ordered:
        at = _draw(document, seed) / 2**64
        name = (
            "test"
            if at < test_share
            else ("decision" if at < test_share + decision_share else "train")
        )
        drawn[name].append(document)
    return _without_near_copies(drawn)


def make_splits(
    documents: list[Document],
    tokenizer: Any,
    *,
    block_tokens: int,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
    most_blocks: int = ENOUGH_BLOCKS,
) -> Splits:
    """Three disjoint splits of packed blocks [N, block_tokens].

    most_blocks: blocks kept of a split at most. Raises ValueError when a split gets no block.
    """
    kept = split_documents(
        documents, seed=seed, decision_share=decision_share, test_share=test_share
    )
    blocks = {name: _pack(kept[name], tokenizer, block_tokens, most_blocks) for name in SPLITS}
    for name, block in blocks.items():
        if not len(block.input_ids):
            raise ValueError(
                f"the {name} split has no block of {block_tokens} tokens (of {len(kept[name])} "
                "documents): give more text, or a smaller --dataset-block-tokens"
            )
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda d: d.text):
        digest.update(document.text.encode())
    return Splits(
        **blocks,
        report=SplitReport(
            documents={name: len(kept[name]) for name in SPLITS},
            tokens={name: block.input_ids.numel() for name, block in blocks.items()},
            duplicates_removed=len(documents) - sum(map(len, kept.values())),
            sha256=digest.hexdigest(),
        ),
    )


def _draw(document: Document, seed: int) -> int:
    """A 64-bit number that follows from the seed and the text alone."""
    digest = hashlib.blake2b(f"{seed}\0{document.text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _shingles(document: Document) -> Hashes:
    """Distinct hashes of every run of 8 words, lower-cased, punctuation dropped."""
    words = re.findall(r"\w+", document.text.lower())
    codes = np.array([_word_code(word) for word in words], dtype=np.uint64)
    if len(codes) < _SHINGLE_WORDS:
        return np.unique(codes)
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SHINGLE_WORDS)
    multipliers = np.array([pow(0x100000001B3, i, 2**64) for i in range(_SHINGLE_WORDS)], np.uint64)
    return np.unique((windows * multipliers).sum(axis=1, dtype=np.uint64))


@cache
def _word_code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _without_near_copies(drawn: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Decision and test without documents that nearly repeat one of the splits before them."""
    kept = {"train": drawn["train"]}
    seen = [_shingles(document) for document in drawn["train"]]
    for name in ("decision", "test"):
        known = np.unique(np.concatenate(seen)) if seen else np.array([], np.uint64)
        shingles = [_shingles(document) for document in drawn[name]]
        fresh = [_share_of(s, known) < NEAR_DUPLICATE_SHARE for s in shingles]
        kept[name] = [d for d, ok in zip(drawn[name], fresh, strict=True) if ok]
        seen += [s for s, ok in zip(shingles, fresh, strict=True) if ok]
    return kept


def _share_of(shingles: Hashes, known: Hashes) -> float:
    """Share of the shingles that are in `known` (sorted)."""
    if not len(shingles) or not len(known):
        return 0.0
    places = np.searchsorted(known, shingles).clip(max=len(known) - 1)
    return float((known[places] == shingles).mean())


def _pack(documents: list[Document], tokenizer: Any, block_tokens: int, most: int) -> Blocks:
    """Documents joined by the end-of-text token and cut into blocks; a short last one is left."""
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        for segment in document.segments:
            tokens = tokenizer(segment.text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if segment.learn else [-100] * len(tokens)
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
        if len(ids) >= most * block_tokens:
            break
    count = min(len(ids) // block_tokens, most)
    shape = (count, block_tokens)
    return Blocks(
        input_ids=torch.tensor(ids[: count * block_tokens], dtype=torch.long).view(shape),
        labels=torch.tensor(labels[: count * block_tokens], dtype=torch.long).view(shape),
    )


def batches(
    blocks: Blocks, *, batch_blocks: int, seed: int, start_step: int = 0
) -> Iterator[Blocks]:
    """Endless batches [batch_blocks, T]; the batch of a step follows from the seed and the step."""
    for step in itertools.count(start_step):
        yield drawn(blocks, step * batch_blocks, batch_blocks, seed=seed)


def drawn(blocks: Blocks, first: int, count: int, *, seed: int) -> Blocks:
    """`count` blocks from place `first` on of the endless order in which steps read them."""
    size = len(blocks.input_ids)
    picks = [_shuffled(size, seed, at // size)[at % size] for at in range(first, first + count)]
    return blocks.rows(torch.tensor(picks))


def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 10_007 + epoch))
