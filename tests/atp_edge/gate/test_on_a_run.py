"""The gate on a finished run of the real model: ATP_GATE_RUN names its folder (`make demo`'s).

The run is read and not written; what is damaged is a copy in memory.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from atp_edge.data.splits import split_documents
from atp_edge.evaluation.scoring import TorchModel
from atp_edge.gate.forms import dense_model
from atp_edge.gate.judge import judge
from atp_edge.gate.measured_text import Measured, Text, measure, texts_of
from atp_edge.gate.quality import check_quality
from atp_edge.gate.settings import QualityLimits, gate_settings
from atp_edge.model.checkpoint import load_narrow
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training.setup import corpus_of, tokenizer_of
from tests.atp_edge.gate.test_statistics import LEVEL, alarms_of

RUN = os.environ.get("ATP_GATE_RUN", "")
pytestmark = [
    pytest.mark.large,
    pytest.mark.real,
    pytest.mark.skipif(not RUN, reason="ATP_GATE_RUN names no finished run"),
]
SECONDS = 240
OTHER = "health"
"""A domain that `make demo`'s run has none of."""


def decision_texts(most: int, **settings: Any) -> list[Text]:
    """Of the decision split, so that nothing is chosen on the test."""
    config = with_values(RunFolder(Path(RUN)).config(), settings)
    tokenizer = tokenizer_of(config)
    parts = split_documents(corpus_of(config, tokenizer).documents, seed=config.seed)
    return texts_of(parts["decision"], tokenizer, most=most, tokens=192, seed=0)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return decision_texts(120)


@pytest.fixture(scope="module")
def measured(texts: list[Text]) -> Measured:
    run = RunFolder(Path(RUN))
    return measure(dense_model(run), TorchModel(load_narrow(run.slim)), texts)


def test_it_takes_less_than_four_minutes(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    run, began = RunFolder(tmp_path / "run"), time.perf_counter()
    report, _ = judge(run, run.config(), gate_settings({}), list[str]().append)
    assert report.checks
    assert time.perf_counter() - began < SECONDS


def test_null_comparisons_of_real_answers(
    measured: Measured, record_property: Callable[[str, object], None]
) -> None:
    """2,000: of 200, one draw in a hundred alarms oftener than the interval by chance."""
    low, high = stats.binom.interval(0.95, 2000, LEVEL)
    whole, any_slice = alarms_of(measured, 2000)
    record_property("false alarms of 2000, average and any slice", (whole, any_slice))
    assert low <= whole <= high
    assert any_slice <= high


@pytest.mark.timeout(1200)
def test_a_slice_that_was_cut_away_is_caught_where_the_average_is_not(
    texts: list[Text], record_property: Callable[[str, object], None]
) -> None:
    """A rare slice of another domain among the run's text: the slim model against itself without
    MLP channels that this slice needs and the others would rather lose."""
    slim: Any = load_narrow(RunFolder(Path(RUN)).slim)
    rare = [replace(text, slice="rare") for text in decision_texts(12, data=OTHER)]
    damaged = copy.deepcopy(slim)
    zero(damaged, effects(slim, rare)[0], *effects(slim, texts[:48]), channels=200)
    found = measure(TorchModel(slim), TorchModel(damaged), [*texts, *rare])
    checks, _ = check_quality(found, QualityLimits(), LEVEL)
    record_property("checks", [check.text for check in checks])
    statuses = {check.key: check.status for check in checks}
    assert statuses["loss"] == "passed"
    assert statuses["loss [rare]"] == "failed"
    assert list(statuses.values()).count("failed") == 1


def effects(model: Any, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss gains, to first order, when an MLP channel goes: the mean over texts, and the
    mean of its size."""
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    gains = []
    for text in texts:
        ids = torch.tensor([text.ids])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gains.append(torch.cat([-(w * w.grad).sum(0) for w in weights]).detach())
    model.zero_grad()
    found = torch.stack(gains)
    return found.mean(0), found.abs().mean(0)


@torch.no_grad()
def zero(
    model: Any, own: torch.Tensor, others: torch.Tensor, sizes: torch.Tensor, *, channels: int
) -> None:
    """So many channels that the slice needs, and the others do not."""
    asked = (own > own.quantile(0.8)) & (others < 0) & (sizes < sizes.quantile(0.98))
    scores = torch.where(asked, (own - others) / sizes, -torch.inf)
    gone = torch.zeros(len(scores), dtype=torch.bool)
    gone[scores.topk(channels).indices] = True
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    for weight, of in zip(weights, gone.split([w.shape[1] for w in weights]), strict=True):
        weight[:, of] = 0


def test_the_interval_narrows_with_the_documents(measured: Measured) -> None:
    """Half of the documents: about 1.4 times as wide."""
    whole = check_quality(measured, QualityLimits(), LEVEL)[0][0]
    kept = np.flatnonzero(measured.text < len(measured.slices) // 2)
    half = Measured(
        text=measured.text[kept],
        slices=measured.slices[: len(measured.slices) // 2],
        **{
            name: tuple(x[kept] for x in getattr(measured, name))  # type: ignore[arg-type]
            for name in ("nats", "confidence", "right")
        },
        kl=measured.kl[kept],
        same_top=measured.same_top[kept],
    )
    few = check_quality(half, QualityLimits(), LEVEL)[0][0]
    assert few.detectable is not None
    assert whole.detectable is not None
    assert 1.1 < few.detectable / whole.detectable < 2.0
