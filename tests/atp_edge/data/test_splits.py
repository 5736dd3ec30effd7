"""Domain text in every form a user has it, and splits that leak nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from atp_edge.config import Config, with_values
from atp_edge.data.blocks import Blocks, batches, drawn
from atp_edge.data.documents import Document, Segment
from atp_edge.data.reader import read_corpus
from atp_edge.data.splits import make_splits
from atp_edge.training.setup import splits_of


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


def text(name: int, words: int = 120) -> str:
    return " ".join(f"w{(name * 7919 + i * i * 31 + i) % 5000}" for i in range(words))


def corpus(count: int = 60) -> list[Document]:
    return [Document((Segment(text(i)),)) for i in range(count)]


def test_jsonl_in_its_three_forms(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"text": "All rights reserved."},
        {"prompt": "Q: may I? ", "completion": "A: you may."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    plain, pair, chat = read_corpus(str(path), tokenizer).documents
    assert [s.learn for s in plain.segments] == [True]
    assert [s.learn for s in pair.segments] == [False, True]
    learned = "".join(s.text for s in chat.segments if s.learn)
    assert "Yo" in learned
    assert "Hi" not in learned
    expected = tokenizer.apply_chat_template(rows[2]["messages"], tokenize=False)
    assert chat.text == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 2: not JSON"),
        ('{"txt": "x"}', r"line 2: found the keys \['txt'\]; expected text"),
        ("[1]", r"line 2: found the keys \[\]"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_corpus(str(path), tokenizer)


def test_plain_text_csv_and_parquet(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    assert len(read_corpus(str(tmp_path / "a.txt"), tokenizer).documents) == 3
    table = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.csv", "a.parquet", "saved"):
        documents = read_corpus(str(tmp_path / name), tokenizer).documents
        assert [document.text for document in documents] == ["x", "y"]


@pytest.mark.parametrize("name", ["nothing.jsonl", "a.docx"])
def test_data_that_is_none_is_named(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"expected .*jsonl"):
        read_corpus(str(tmp_path / name), tokenizer)


def test_splits_share_no_document_and_follow_from_the_seed(tokenizer: Any) -> None:
    documents = corpus()
    options: dict[str, Any] = {"block_tokens": 64, "decision_share": 0.2, "test_share": 0.2}
    splits = make_splits(documents, tokenizer, seed=1, **options)
    again = make_splits(documents[::-1], tokenizer, seed=1, **options)
    other = make_splits(documents, tokenizer, seed=2, **options)
    assert splits.report.documents == again.report.documents
    assert torch.equal(splits.test.input_ids, again.test.input_ids)
    assert splits.report.sha256 == other.report.sha256
    assert not torch.equal(splits.test.input_ids[0], other.test.input_ids[0])
    assert sum(splits.report.documents.values()) == len(documents)
    first = {tuple(b.tolist()) for b in splits.train.input_ids}
    assert first.isdisjoint(tuple(b.tolist()) for b in splits.test.input_ids)


def test_near_copies_across_splits_are_taken_out_and_counted(tokenizer: Any) -> None:
    documents = corpus(40)
    copies = [Document((Segment(d.text + f" and one word more {i}"),))
              for i, d in enumerate(documents)]  # fmt: skip
    splits = make_splits(
        documents + copies, tokenizer, seed=0, block_tokens=64, decision_share=0.3, test_share=0.3
    )
    assert splits.report.duplicates_removed > 5
    where = {}
    words = {name: " ".join(tokenizer.batch_decode(getattr(splits, name).input_ids))
             for name in ("train", "decision", "test")}  # fmt: skip
    for i, document in enumerate(documents):
        start = document.text[20:200]
        where[i] = [name for name, found in words.items() if start in found]
    assert all(len(names) <= 1 for names in where.values())


def test_prompts_carry_no_loss(tokenizer: Any) -> None:
    documents = [
        Document((Segment(text(i), False), Segment(text(1000 + i, 30)))) for i in range(40)
    ]
    # A block holds a whole document, so that none is left out for want of a label.
    splits = make_splits(documents, tokenizer, seed=0, block_tokens=768)
    share = (splits.train.labels != -100).float().mean()
    assert 0.1 < share < 0.4
    learned = splits.train.labels != -100
    assert torch.equal(splits.train.labels[learned], splits.train.input_ids[learned])


def test_too_little_text_names_the_split(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"split has no block of 1024 tokens"):
        make_splits(corpus(3), tokenizer, seed=0, block_tokens=1024)


def corpus_config(tmp_path: Path, real_folder: Path, settings: dict[str, Any]) -> Config:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": document.text}) for document in corpus()))
    return with_values(Config(), {"model": str(real_folder), "data": str(path)} | settings)


def test_a_long_run_is_given_as_much_text_as_it_reads(tmp_path: Path, real_folder: Path) -> None:
    short = corpus_config(tmp_path, real_folder, {"dataset.block_tokens": 4})
    long = with_values(short, {"steps": 2600, "train.batch_blocks": 2})
    assert [len(splits_of(c).train.input_ids) for c in (short, long)] == [4096, 5200]


def test_the_test_is_spread_over_its_split(tmp_path: Path, real_folder: Path) -> None:
    config = corpus_config(tmp_path, real_folder, {"dataset.block_tokens": 64})
    few, all_ = (
        splits_of(with_values(config, {"dataset.test_blocks": count})).test.input_ids
        for count in (3, 10_000)
    )
    assert len(all_) > 6
    assert torch.equal(few, all_[[0, round((len(all_) - 1) / 2), -1]])


def test_the_batch_of_a_step_follows_from_seed_and_step() -> None:
    ids = torch.arange(14).view(7, 2)
    blocks = Blocks(input_ids=ids, labels=ids)
    whole = batches(blocks, batch_blocks=3, seed=4)
    seen = [next(whole).input_ids for _ in range(9)]
    later = batches(blocks, batch_blocks=3, seed=4, start_step=5)
    assert torch.equal(next(later).input_ids, seen[5])
    assert torch.equal(drawn(blocks, 6, 9, seed=4).input_ids, torch.cat(seen[2:5]))
    epoch = torch.cat(seen)[:7]
    assert sorted(epoch[:, 0].tolist()) == ids[:, 0].tolist()


def test_blocks_are_spread_over_the_whole_split() -> None:
    ids = torch.arange(10)[:, None].expand(10, 4)
    blocks = Blocks(input_ids=ids, labels=-ids)
    assert blocks.spread(4).input_ids[:, 0].tolist() == [0, 3, 6, 9]
    assert blocks.spread(4).labels[:, 0].tolist() == [0, -3, -6, -9]
    assert torch.equal(blocks.spread(12).input_ids, ids)


@pytest.mark.real
@pytest.mark.parametrize("domain", ["legal", "health"])
def test_built_in_domains_are_read_from_their_packages(domain: str, tokenizer: Any) -> None:
    documents = read_corpus(domain, tokenizer).documents
    assert len(documents) > 1000
    assert len({d.slice for d in documents}) > 5
    assert min(len(d.text) for d in documents) >= 390
