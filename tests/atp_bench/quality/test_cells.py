"""The cells of the quality matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
from atp_bench.quality.cells import DOCUMENTS, METHODS, matrix

from atp_edge.config import Config
from tests.atp_bench.quality.example import results


def test_every_preset_names_known_methods_and_the_quick_one_is_small() -> None:
    for preset in ("quick", "cpu", "gpu", "little"):
        for made in matrix(preset):  # type: ignore[arg-type]
            made.config(Config())
        assert len(set(matrix(preset))) == len(matrix(preset))  # type: ignore[arg-type]
    assert len(matrix("quick")) == 2
    assert {c.method for c in matrix("cpu")} >= set(METHODS)
    longest = max(c.config(Config()).train_tokens for c in matrix("gpu"))
    assert longest >= 20_000_000


def test_little_text_is_a_cut_of_the_train_split_alone() -> None:
    made = matrix("little")
    assert {cell.documents for cell in made} == set(DOCUMENTS)
    assert made[0].key == "frozen, cut at once/legal/0/0.6/per-layer/200/documents=30"
    assert made[0].config(Config()).dataset.train_documents == 30
    assert replace(made[0], documents=0) in matrix("cpu")


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="method 'magic': expected one of atp, frozen"):
        replace(results()[0].cell, method="magic").config(Config())
