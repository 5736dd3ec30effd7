"""Tasks: from the test documents alone, the same by seed, with near and distinct distractors."""

from __future__ import annotations

import re
from functools import cache

import pytest

from atp_edge.data.documents import Document, Segment
from atp_edge.data.domains import DOMAINS
from atp_edge.data.splits import split_documents
from atp_edge.evaluation.distractors import CHOICES
from atp_edge.evaluation.items import ChoiceTask, Task
from atp_edge.evaluation.tasks import domain_tasks


@cache
def splits(source: str) -> dict[str, list[Document]]:
    documents = [Document((Segment(text),), kind) for text, kind in DOMAINS[source]()]
    return split_documents(documents, seed=0)


@cache
def tasks(source: str, seed: int = 0) -> list[Task]:
    found = splits(source)
    return domain_tasks(source, found["test"], train=found["train"], items=12, seed=seed)


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("source", DOMAINS)
def test_answers_come_from_the_test_documents_and_occur_in_no_train_document(source: str) -> None:
    test = " ".join(plain(d.text) for d in splits(source)["test"])
    train = "\n".join(plain(d.text) for d in splits(source)["train"])
    for task in tasks(source):
        assert len(task.items) == 12
        for item in task.items:
            if isinstance(task, ChoiceTask):
                answer = plain(item.options[item.answer].text)
            else:
                answer = plain(item.reference)
            assert f" {answer} " not in train
            if source == "legal":  # health's labels come from the package: lists are cut to three
                assert answer in test


@pytest.mark.parametrize("source", DOMAINS)
def test_items_have_distinct_options_and_one_answer_in_every_place(source: str) -> None:
    for task in tasks(source):
        if isinstance(task, ChoiceTask):
            assert task.chance == 1 / CHOICES
            for item in task.items:
                assert len({(o.prompt, o.text) for o in item.options}) == CHOICES
            assert len({item.answer for item in task.items}) > 1


def test_tasks_follow_from_the_seed() -> None:
    found = splits("health")
    again = domain_tasks("health", found["test"], train=found["train"], items=12, seed=0)
    assert again == tasks("health")
    assert tasks("health", 1) != tasks("health")


def test_no_item_when_every_answer_was_trained_on() -> None:
    test = splits("legal")["test"]
    with pytest.raises(ValueError, match=r"give no item for continuation, clause, next-words"):
        domain_tasks("legal", test, train=test, items=5, seed=0)


def test_any_text_gives_tasks() -> None:
    made = domain_tasks("file.txt", splits("legal")["test"], train=[], items=3, seed=0)
    assert [task.name for task in made] == ["continuation", "clause", "next-words"]
