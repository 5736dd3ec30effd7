"""Three splits that share no document: train, decision and test.

Splits are drawn by document from a hash of the seed and what the user wrote, so that they depend on
neither order nor run nor chat template; a document of the decision or test split that nearly
repeats one of another split is taken out and counted. So is one of the test that nearly repeats a
text that the decision protects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atp_edge.data.blocks import Blocks, Packed, pack
from atp_edge.data.canaries import planted_documents, with_canaries
from atp_edge.data.documents import Document, Segment, SpecialTokens
from atp_edge.data.encoding import Encoder
from atp_edge.data.near_copies import without_near_copies

SPLITS = ("train", "decision", "test")
# Packed of a split where there is so much, however short the run: their order is then the same.
ENOUGH_BLOCKS = 4096
VALIDATION_BLOCKS = 8
_MOST_CANARIES = 0.1  # of the tokens that training reads
CALIBRATION_BLOCKS = 32


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What the splits hold, and what of the data they do not."""

    documents: dict[str, int]
    tokens: dict[str, int]
    duplicates_removed: int
    sha256: str
    test_seen_in_train: float
    """Share of the test split's runs of 8 words that the train split has too."""
    blocks_without_label: int
    documents_cut: int
    """Documents that were too few for three splits, and cut into a part for each."""
    rows_skipped: int = 0
    rows_with_special_tokens: int = 0

    def said(self, special_tokens: SpecialTokens) -> list[str]:
        """What a user should know before training, a sentence each."""
        read = "as text" if special_tokens == "text" else "as the tokens"
        counted = {
            "bad rows left out": self.rows_skipped,
            f"rows that hold special-token text, read {read}": self.rows_with_special_tokens,
            "near copies of documents in other splits, or of what is protected, left out": (
                self.duplicates_removed
            ),
            "blocks without a part of an answer left out": self.blocks_without_label,
            "documents too few for three splits, each cut in three": self.documents_cut,
        }
        return [f"{what}: {count}" for what, count in counted.items() if count]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Train, decision and test blocks, disjoint by document."""

    train: Blocks
    decision: Blocks
    test: Blocks
    report: SplitReport
    protected: Blocks | None = None
    """Text that the decision must keep, where there is one."""

    @property
    def validation(self) -> Blocks:
        """The blocks that tuning is validated on as it goes."""
        return self.decision.spread(VALIDATION_BLOCKS)

    @property
    def calibration(self) -> Tensor:
        """Token ids [N, T] of the train split, for quantizers that read text."""
        return self.train.spread(CALIBRATION_BLOCKS).input_ids


def split_documents(
    documents: Sequence[Document],
    *,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
    train_documents: int = 0,
    protected: Sequence[Document] = (),
) -> dict[str, list[Document]]:
    """Documents of train, decision and test: drawn by hash, near copies of earlier splits out, and
    out of the test those of `protected`.

    train_documents: of the train split at most, 0: all; decision and test stay as they are. Each
    split is drawn one document at least. Fewer than three documents are cut, each into a part
    for every split. Raises ValueError where they cannot be.
    """
    drawn = _drawn(documents, seed=seed, decision_share=decision_share, test_share=test_share)
    return _parted(drawn, train_documents, protected)[0]


def make_splits(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    block_tokens: int,
    seed: int,
    decision_share: float = 0.1,
    test_share: float = 0.1,
    train_documents: int = 0,
    most_blocks: int = ENOUGH_BLOCKS,
    protected: Sequence[Document] = (),
    canaries: int = 0,
    blocks_read: int = 1,
) -> Splits:
    """Three disjoint splits of packed blocks [N, block_tokens], drawn as by `split_documents`.

    most_blocks: blocks kept of a split at most. canaries: planted in the train split, each so often
    that it is read about once when training reads `blocks_read` blocks. Raises ValueError when a
    split gets no block.
    """
    drawn = _drawn(documents, seed=seed, decision_share=decision_share, test_share=test_share)
    kept, seen = _parted(drawn, train_documents, protected)
    packed = {
        "train": pack_train(
            kept["train"], tokenizer, block_tokens=block_tokens, seed=seed,
            most_blocks=most_blocks, canaries=canaries, blocks_read=blocks_read,
        ),
        **{
            name: pack(kept[name], Encoder(tokenizer), block_tokens, most_blocks)
            for name in ("decision", "test")
        },
    }  # fmt: skip
    for name, one in packed.items():
        if not len(one.blocks.input_ids):
            cause = _why_empty(one, block_tokens, len(drawn[name]), len(kept[name]))
            raise ValueError(f"the {name} split has no block of {block_tokens} tokens: {cause}")
    digest = hashlib.sha256()
    for key in sorted(document.key for document in documents):
        digest.update(key.encode())
    return Splits(
        **{name: one.blocks for name, one in packed.items()},
        report=SplitReport(
            documents={name: len(kept[name]) for name in SPLITS},
            tokens={name: one.blocks.input_ids.numel() for name, one in packed.items()},
            duplicates_removed=sum(len(drawn[x]) - len(kept[x]) for x in ("decision", "test")),
            sha256=digest.hexdigest(),
            test_seen_in_train=round(seen, 4),
            blocks_without_label=sum(one.unlabelled for one in packed.values()),
            documents_cut=len(documents) if len(documents) < len(SPLITS) else 0,
        ),
    )


def pack_train(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    block_tokens: int,
    seed: int,
    most_blocks: int = ENOUGH_BLOCKS,
    canaries: int = 0,
    blocks_read: int = 1,
) -> Packed:
    """The documents of a train split as training reads them: packed, canaries among them (settings
    as those of `make_splits`)."""
    encoder = Encoder(tokenizer)
    packed = pack(documents, encoder, block_tokens, most_blocks)
    if not canaries:
        return packed
    _check_canaries(canaries, encoder, blocks_read * block_tokens, seed)
    copies = max(1, round(len(packed.blocks.input_ids) / blocks_read))
    # Among the documents that fill the blocks: of a larger text the rest is not read.
    planted = with_canaries(documents[: packed.documents], canaries, copies, seed)
    return pack(planted, encoder, block_tokens, most_blocks)


def _check_canaries(count: int, encoder: Encoder, tokens_read: int, seed: int) -> None:
    """Raise ValueError for canaries that would be much of what training reads."""
    each = len(encoder.encode(planted_documents(1, seed)[0])[0])
    most = int(_MOST_CANARIES * tokens_read) // each
    if count > most:
        raise ValueError(
            f"canaries = {count}: of {each} tokens each, they would be "
            f"{count * each / tokens_read:.0%} of the {tokens_read:,} tokens that training reads; "
            f"take {most} or fewer, or more --steps"
        )


def _parted(
    drawn: dict[str, list[Document]], train_documents: int, protected: Sequence[Document]
) -> tuple[dict[str, list[Document]], float]:
    """The splits without near copies, train then cut; and the share of the test seen in train."""
    kept, seen = without_near_copies(drawn, protected)
    if not train_documents:
        return kept, seen
    return without_near_copies(kept | {"train": kept["train"][:train_documents]}, protected)


def _why_empty(packed: Packed, block_tokens: int, drawn: int, kept: int) -> str:
    """The cause, and what to do."""
    if packed.unlabelled:
        return (
            f"of its {packed.unlabelled} blocks none holds a part of an answer; give shorter "
            "prompts, more rows, or larger --dataset-block-tokens"
        )
    if not kept:
        return (
            f"all {drawn} documents drawn for it are near copies of those in other splits or of "
            "what is protected; give texts that differ, and leave out what they all begin with"
        )
    return (
        f"{packed.tokens} tokens in {kept} documents ({drawn - kept} near copies left out); give "
        "more text, documents of like length, or a smaller --dataset-block-tokens"
    )


def _drawn(
    documents: Sequence[Document], *, seed: int, decision_share: float, test_share: float
) -> dict[str, list[Document]]:
    if not 0 < decision_share + test_share < 1 or min(decision_share, test_share) <= 0:
        raise ValueError(
            f"decision share {decision_share} and test share {test_share}: expected both above 0 "
            "and their sum below 1"
        )
    if len(documents) < len(SPLITS):
        parts = [_parts(document, decision_share, test_share) for document in documents]
        return dict(zip(SPLITS, map(list, zip(*parts, strict=True)), strict=True))
    ordered = sorted((_draw(document, seed), i) for i, document in enumerate(documents))
    sorted_documents = [documents[i] for _, i in ordered]
    shares = (test_share, test_share + decision_share)
    test_end, decision_end = (sum(at / 2**64 < share for at, _ in ordered) for share in shares)
    # Of few documents the hash may give a split none.
    decision_end = min(max(decision_end, 2), len(documents) - 1)
    test_end = min(max(test_end, 1), decision_end - 1)
    return {
        "train": sorted_documents[decision_end:],
        "decision": sorted_documents[test_end:decision_end],
        "test": sorted_documents[:test_end],
    }


def _draw(document: Document, seed: int) -> int:
    """A 64-bit number that follows from the seed and what the user wrote alone."""
    digest = hashlib.blake2b(f"{seed}\0{document.key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _parts(document: Document, decision_share: float, test_share: float) -> list[Document]:
    """The parts of one text, from its start on: train, decision and test."""
    if len(document.segments) > 1 or document.rendered:
        raise ValueError(
            "fewer than three rows of prompts or conversations make no three splits; give more"
        )
    segment, text = document.segments[0], document.text
    decision = _boundary(text, round(len(text) * (1 - decision_share - test_share)))
    test = max(decision, _boundary(text, round(len(text) * (1 - test_share))))
    return [
        Document((Segment(part.strip(), segment.learn, segment.parse),), document.slice)
        for part in (text[:decision], text[decision:test], text[test:])
    ]


def _boundary(text: str, near: int) -> int:
    """The place after the last paragraph, or else line, or word, that ends shortly before `near`:
    within a twentieth of the text."""
    first = max(0, near - len(text) // 20)
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, first, near)
        if at >= 0:
            return at + len(end)
    return near
