"""Splits that leak nothing, whatever the text, and say what of it they left out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from atp_edge.config import Config
from atp_edge.data.documents import Document, Segment
from atp_edge.data.domains import DOMAINS
from atp_edge.data.near_copies import without_near_copies
from atp_edge.data.reader import read_corpus
from atp_edge.data.splits import make_splits, split_documents
from atp_edge.losses import language_loss
from atp_edge.settings import with_values
from atp_edge.training.setup import splits_of
from tests.tiny import tiny_model
from tests.tiny_tokenizers import CHATML, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(real_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_folder)


def text(name: int, words: int = 120) -> str:
    return " ".join(f"w{(name * 7919 + i * i * 31 + i) % 5000}" for i in range(words))


def corpus(count: int = 60) -> list[Document]:
    return [Document((Segment(text(i)),)) for i in range(count)]


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


def test_fewer_train_documents_leave_decision_and_test_as_they_are(tokenizer: Any) -> None:
    documents = corpus() + corpus(20)
    whole = make_splits(documents, tokenizer, seed=1, block_tokens=64)
    for count in (5, 10_000):
        cut = make_splits(documents, tokenizer, seed=1, block_tokens=64, train_documents=count)
        held = len(cut.train.input_ids)
        assert cut.report.documents["train"] == min(count, whole.report.documents["train"])
        assert torch.equal(cut.train.input_ids, whole.train.input_ids[:held])
        assert torch.equal(cut.decision.input_ids, whole.decision.input_ids)
        assert torch.equal(cut.test.input_ids, whole.test.input_ids)
        assert cut.report.duplicates_removed == whole.report.duplicates_removed


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


# Of the code before BOS, special tokens and rendered conversations were told apart.
RECORDED = {
    "legal": "c779ea6c34b15ae0de7658ef055eb76bc65e5a24fbaba6849d93e622cc894c2f",
    "health": "88f405500e8064a53df65825f673aecf10ae9c8ff09dc98620f48157a1ce6e50",
}


@pytest.mark.real
@pytest.mark.parametrize("domain", DOMAINS)
def test_blocks_of_the_demo_s_domains_are_those_they_always_were(
    domain: str, tokenizer: Any
) -> None:
    documents = [Document((Segment(t),), kind) for t, kind in DOMAINS[domain]()[:400]]
    splits = make_splits(documents, tokenizer, block_tokens=128, seed=0, most_blocks=64)
    digest = hashlib.sha256()
    for blocks in (splits.train, splits.decision, splits.test):
        digest.update(blocks.input_ids.numpy().tobytes())
        digest.update(blocks.labels.numpy().tobytes())
    assert digest.hexdigest() == RECORDED[domain]


def chats(folder: Path, count: int) -> str:
    rows = [
        [{"role": "user", "content": text(i)}, {"role": "assistant", "content": text(1000 + i)}]
        for i in range(count)
    ]
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return str(path)


def test_a_template_that_prints_the_date_moves_nothing(tmp_path: Path) -> None:
    source = chats(tmp_path, 30)
    found = []
    for clock in ("Monday ", "Tuesday ", "{{ strftime_now('%S.%f') }}"):
        tokenizer = tokenizer_of("byte-level", template=clock + CHATML)
        documents = read_corpus(source, tokenizer).documents
        parts = split_documents(documents, seed=0)
        digest = make_splits(documents, tokenizer, seed=0, block_tokens=64).report.sha256
        found.append(({name: [d.key for d in part] for name, part in parts.items()}, digest))
    assert found[0] == found[1] == found[2]


def test_documents_by_split_are_those_that_training_reads() -> None:
    """What the gate and the tasks take for the train split was trained on."""
    documents = corpus(60)
    whole, few = split_documents(documents, seed=0), 7
    cut = split_documents(documents, seed=0, train_documents=few)
    assert cut == whole | {"train": whole["train"][:few]}


def test_the_test_holds_nothing_of_what_the_decision_protects() -> None:
    documents = corpus(60)
    plain = split_documents(documents, seed=0)
    told, *others = plain["test"]
    near = Document((Segment(f"{told.text} and a few words more"),))
    protected = split_documents(documents, seed=0, protected=[near, plain["decision"][0]])
    assert protected == plain | {"test": others}


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("seed", range(5))
def test_of_few_documents_every_split_gets_one(count: int, seed: int) -> None:
    documents = corpus(count)
    parts = split_documents(documents, seed=seed)
    assert sorted(d.text for part in parts.values() for d in part) == sorted(
        d.text for d in documents
    )
    assert min(map(len, parts.values())) >= 1


def test_one_long_document_is_cut_at_paragraphs_into_three_parts(tokenizer: Any) -> None:
    paragraphs = [text(i, 60) for i in range(200)]
    whole = Document((Segment("\n\n".join(paragraphs)),), "book")
    parts = split_documents([whole], seed=0, decision_share=0.1, test_share=0.2)
    texts = [parts[name][0].text for name in ("train", "decision", "test")]
    assert [p for t in texts for p in t.split("\n\n")] == paragraphs
    shares = [len(t) / len(whole.text) for t in texts]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert parts["test"][0].slice == "book"
    splits = make_splits([whole], tokenizer, seed=0, block_tokens=64)
    assert splits.report.documents == {"train": 1, "decision": 1, "test": 1}
    assert splits.report.said("text") == [
        "documents too few for three splits, each cut in three: 1"
    ]


def test_a_text_without_paragraphs_is_cut_at_lines_or_words_or_anywhere() -> None:
    for joined, split in (("\n", "\n"), (" ", " ")):
        pieces = [f"w{i}" for i in range(1000)]
        parts = split_documents([Document((Segment(joined.join(pieces)),))], seed=0)
        assert [p for part in parts.values() for p in part[0].text.split(split)] == pieces
    digits = "".join(map(str, range(400)))
    parts = split_documents([Document((Segment(digits),))], seed=0)
    assert [len(part[0].text) for part in parts.values()] == [872, 109, 109]


def test_two_rows_of_conversations_make_no_splits(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level", template=CHATML)
    documents = read_corpus(chats(tmp_path, 2), tokenizer).documents
    with pytest.raises(ValueError, match="fewer than three rows of prompts or conversations"):
        make_splits(documents, tokenizer, seed=0, block_tokens=8)


def test_prompts_of_several_blocks_leave_blocks_that_can_be_learned() -> None:
    tokenizer = tokenizer_of("byte-level", bos=False)
    rows = [Document((Segment(text(i), False), Segment(f" Yes, {i}."))) for i in range(40)]
    splits = make_splits(rows, tokenizer, seed=0, block_tokens=32)
    assert splits.report.blocks_without_label > len(splits.train.input_ids)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    for i in range(len(splits.train.input_ids)):
        assert language_loss(model, splits.train.rows([i])).isfinite()
    with pytest.raises(ValueError, match=r"of its \d+ blocks none holds a part of an answer; give"):
        make_splits(rows[:8], tokenizer, seed=0, block_tokens=256)


def test_texts_that_all_begin_alike_are_told() -> None:
    rows = [Document((Segment(f"{text(0)} {i}"),)) for i in range(30)]
    with pytest.raises(
        ValueError, match=r"all \d+ documents drawn for it are near copies of those"
    ):
        make_splits(rows, tokenizer_of("byte-level"), seed=0, block_tokens=8)


def test_the_share_of_the_test_that_the_train_split_has_is_reported() -> None:
    def of(*words: str) -> Document:
        return Document((Segment(" ".join(words)),))

    shared, own, more = ([f"{c}{i}" for i in range(11)] for c in "abc")
    drawn = {"train": [of(*shared)], "decision": [], "test": [of(*shared[:9], *own, *more)]}
    kept, seen = without_near_copies(drawn)
    # Of the 31 - 7 runs of 8 words in the test, the first two.
    assert seen == pytest.approx(2 / 24)
    assert kept == drawn


def test_a_short_text_is_a_near_copy_of_its_own_words_alone() -> None:
    yes, no, again = (
        Document((Segment(t),)) for t in ("Yes, you may.", "No, you may.", "yes you may")
    )
    kept, _ = without_near_copies({"train": [yes], "decision": [no], "test": [again]})
    assert kept == {"train": [yes], "decision": [no], "test": []}


def test_a_tokenizer_that_adds_bos_has_it_before_every_document() -> None:
    documents = corpus(30)
    tokenizer = tokenizer_of("llama-3")
    train = make_splits(documents, tokenizer, seed=0, block_tokens=16).train
    ids, starts = train.input_ids.flatten(), train.input_ids.flatten() == tokenizer.bos_token_id
    assert 20 <= int(starts.sum()) <= 30
    assert (ids[:-1][starts[1:]] == tokenizer.eos_token_id).all()  # and after the end of the last


def test_blocks_longer_than_the_model_reads_are_refused(tmp_path: Path, real_folder: Path) -> None:
    config = corpus_config(tmp_path, real_folder, {"dataset.block_tokens": 100_000})
    with pytest.raises(ValueError, match=r"dataset.block_tokens = 100000: the model reads \d+ pos"):
        splits_of(config)


def test_tokens_without_an_embedding_are_refused_at_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level")
    tokenizer.add_tokens(["<law>"])
    tiny_model("llama", vocab_size=len(tokenizer) - 1).config.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    config = corpus_config(tmp_path, tmp_path / "m", {"dataset.block_tokens": 64})
    with pytest.raises(ValueError, match=r"token '<law>' has the id"):
        splits_of(config)


def test_what_was_left_out_reaches_the_report(tmp_path: Path, real_folder: Path) -> None:
    config = corpus_config(tmp_path, real_folder, {"dataset.block_tokens": 64})
    with Path(config.data).open("a") as file:
        file.write('\n{"text": null}\n' + json.dumps({"text": text(99) + " <|im_end|>"}))
    with pytest.raises(ValueError, match=r"a.jsonl, line 61: text: null"):
        splits_of(config)
    report = splits_of(with_values(config, {"dataset.skip_bad_lines": True})).report
    assert (report.rows_skipped, report.rows_with_special_tokens) == (1, 1)
    assert report.said("text") == [
        "bad rows left out: 1",
        "rows that hold special-token text, read as text: 1",
    ]
