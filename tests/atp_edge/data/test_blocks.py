"""Blocks: cut from documents, none without a label; the order in which steps read them."""

from __future__ import annotations

import pytest
import torch

from atp_edge.data.blocks import Blocks, drawn, pack
from atp_edge.data.documents import Document, Segment
from atp_edge.data.encoding import Encoder
from tests.tiny_tokenizers import tokenizer_of


def test_the_batch_of_a_step_follows_from_seed_and_step() -> None:
    ids = torch.arange(14).view(7, 2)
    blocks = Blocks(input_ids=ids, labels=ids)
    seen = [drawn(blocks, 3 * step, 3, seed=4).input_ids for step in range(9)]
    assert torch.equal(drawn(blocks, 6, 9, seed=4).input_ids, torch.cat(seen[2:5]))
    epoch = torch.cat(seen)[:7]
    assert sorted(epoch[:, 0].tolist()) == ids[:, 0].tolist()
    assert not torch.equal(drawn(blocks, 0, 7, seed=5).input_ids, epoch)


def test_blocks_are_spread_over_the_whole_split() -> None:
    ids = torch.arange(10)[:, None].expand(10, 4)
    blocks = Blocks(input_ids=ids, labels=-ids)
    assert blocks.spread(4).input_ids[:, 0].tolist() == [0, 3, 6, 9]
    assert blocks.spread(4).labels[:, 0].tolist() == [0, -3, -6, -9]
    assert torch.equal(blocks.spread(12).input_ids, ids)


def pair(prompt_words: int) -> Document:
    return Document((Segment("copy " * prompt_words, learn=False), Segment(" Yes, you may.")))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tokenizer_of("byte-level", bos=False))


def test_a_block_in_which_nothing_is_learned_is_left_out_and_counted(encoder: Encoder) -> None:
    documents = [pair(100), pair(3), pair(200)]
    ids = [i for document in documents for i in encoder.encode(document)[0]]
    labels = [i for document in documents for i in encoder.encode(document)[1]]
    packed = pack(documents, encoder, 8, 1000)
    starts = range(0, len(ids) - 7, 8)
    kept = [i for i in starts if any(label != -100 for label in labels[i + 1 : i + 8])]
    assert packed.blocks.input_ids.tolist() == [ids[i : i + 8] for i in kept]
    assert packed.blocks.labels.tolist() == [labels[i : i + 8] for i in kept]
    assert packed.unlabelled == len(starts) - len(kept) > 10
    assert packed.tokens == len(ids)


def test_a_label_on_the_first_token_alone_is_not_learned(encoder: Encoder) -> None:
    documents = [pair(20), pair(200)]
    ids = [i for document in documents for i in encoder.encode(document)[0]]
    size = len(encoder.encode(documents[0])[0]) - 1
    # The second block begins with the last token of the first answer, and holds a prompt.
    rows = pack(documents, encoder, size, 1000).blocks.input_ids.tolist()
    assert ids[:size] in rows
    assert ids[size : 2 * size] not in rows


def test_no_more_blocks_than_asked_for_are_packed(encoder: Encoder) -> None:
    documents = [Document((Segment("You may copy. " * 50),))] * 5
    all_ = pack(documents, encoder, 8, 1000).blocks.input_ids
    assert torch.equal(pack(documents, encoder, 8, 7).blocks.input_ids, all_[:7])
    assert pack([], encoder, 8, 7).blocks.input_ids.shape == (0, 8)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_gives_an_order(seed: int) -> None:
    ids = torch.arange(6)[:, None]
    blocks = Blocks(input_ids=ids, labels=ids)
    assert sorted(drawn(blocks, 6, 6, seed=seed).input_ids.flatten().tolist()) == list(range(6))
