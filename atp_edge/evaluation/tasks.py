"""Tasks of a domain, built from the documents of the test split alone.

Multiple choice by likelihood and generation, in the shape of the tasks of ATP's paper (CaseHOLD,
MedNLI, PubMedQA; BillSum, HQS). Items follow from the seed. Distractors are near: passages of the
same kind of document that share the rare words of the answer, sibling codes. An item whose answer
occurs in a train document is left out.

Tried and dropped, at chance on the untuned 135M model: the licence category of a passage (0.24 of
0.25) and included or excluded terms (0.46 of 0.50).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from atp_edge.data.documents import Document
from atp_edge.evaluation.icd_codes import descriptions, families_of, which_code, which_notes
from atp_edge.evaluation.items import Task, choice_task, text_task
from atp_edge.evaluation.running_text import passages_of, running_text_tasks


def domain_tasks(
    source: str,
    documents: Sequence[Document],
    *,
    train: Sequence[Document],
    items: int,
    seed: int,
) -> list[Task]:
    """The tasks of a built-in domain, or those that any text gives; `items` of each at most.

    documents: the test split; train: documents in which no answer may occur (both from
    `data.split_documents`). Raises ValueError when a task gets no item.
    """
    fresh = _unseen(train)
    if source == "health":
        families = families_of(documents, random.Random(seed))
        tasks: list[Task] = [
            choice_task("code", which_code(families, fresh, seed), items, "sum"),
            choice_task("notes", which_notes(families, fresh, seed), items, "calibrated"),
            text_task("description", descriptions(families, fresh), items),
        ]
    else:
        tasks = running_text_tasks(passages_of(documents, random.Random(seed)), fresh, items, seed)
    empty = [task.name for task in tasks if not task.items]
    if empty:
        raise ValueError(
            f"data {source!r}: the {len(documents)} test documents give no item for "
            f"{', '.join(empty)}; give more text or a larger --dataset-test-share"
        )
    return tasks


def _unseen(train: Sequence[Document]) -> Callable[[str], bool]:
    """Whether a text occurs in no train document, case and punctuation aside."""

    def plain(text: str) -> str:
        words = re.findall(r"\w+", text.lower())
        return f" {' '.join(words)} "

    known = "\n".join(plain(document.text) for document in train)
    return lambda text: plain(text) not in known
