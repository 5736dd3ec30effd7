"""lm-eval's tasks from disk in the gate's verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from atp_bench.lm_eval_adapter import HarnessScore, load_tasks

from atp_edge.evaluation.scoring import TorchModel
from atp_edge.gate.outside_tasks import _difference, _judged, check_outside
from atp_edge.gate.settings import TaskLimits
from tests.atp_bench.test_lm_eval import CHOICE
from tests.atp_edge.gate.taught import taught, tokenizer


def test_a_loss_on_a_task_from_disk_is_a_failure(tmp_path: Path) -> None:
    """The dense model was told the answers, the slim one was not."""
    (tmp_path / "choice.yaml").write_text(CHOICE)
    options = ["red", "blue", "green"]
    rows: list[dict[str, Any]] = [
        {"question": f"Box {i} is", "options": options, "answer": i % 3} for i in range(40)
    ]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = [f"{row['question']} {options[row['answer']]}" for row in rows]
    dense, slim = taught(told, 150), taught(["Box is red"], 20)
    tasks = load_tasks(["contracts"], tmp_path)

    def limits(margin: float) -> TaskLimits:
        return TaskLimits(lm_eval_items=400, lm_eval_loss=margin)

    def statuses(other: Any, margin: float = 0.1) -> dict[str, str]:
        checks, notes = check_outside(
            TorchModel(dense), TorchModel(other), tokenizer(), tasks, limits(margin), 0.05, 64
        )
        assert not notes
        assert all(check.clusters == 40 for check in checks), "as many as were answered"
        return {check.name: check.status for check in checks}

    assert statuses(slim)["lm-eval contracts acc"] == "failed"
    assert statuses(dense)["lm-eval contracts acc"] == "passed"
    assert statuses(dense, 0.05)["lm-eval contracts acc"] == "undecided", "59 items would tell"


def test_without_items_the_errors_of_both_count() -> None:
    before = HarnessScore(
        task="t", metric="acc", value=0.8, error=0.03, higher_is_better=True, per_item=(1.0, 0.0),
        items=7,
    )  # fmt: skip
    after = replace(before, value=0.7, error=0.04)
    paired = _difference(before, replace(after, per_item=(0.0, 0.0)))
    assert paired is not None
    assert (paired.mean, paired.items) == (0.5, 2)
    apart = _difference(before, replace(after, per_item=()))
    assert apart is not None
    assert (apart.clusters, apart.items) == (7, 7)
    assert apart.mean == pytest.approx(0.1)
    assert apart.error == pytest.approx(0.05)
    lower = replace(before, higher_is_better=False, per_item=())
    found = _difference(lower, replace(after, per_item=()))
    assert found is not None
    assert found.mean == pytest.approx(-0.1)
    assert _difference(replace(lower, error=None), after) is None


NOT_TOLD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function made.right
metric_list: [{metric}]
"""
MADE = """
def right(doc, results):
    logs = [log for log, _ in results]
    return {"right": float(logs.index(max(logs)) == doc["answer"])}

def half(items):
    return sum(items) / len(items) / 2
"""


def test_a_task_that_cannot_be_judged_is_undecided(tmp_path: Path) -> None:
    """A metric of which nobody says which way is better was taken as an error: its loss passed. A
    task without any that can be judged had no check."""
    metrics = {
        "aimless": "{metric: right, aggregation: mean}",
        "errorless": "{metric: right, aggregation: !function made.half, higher_is_better: true}",
        "told": "{metric: right, aggregation: mean, higher_is_better: true}",
    }
    for name, metric in metrics.items():
        text = NOT_TOLD.format(name=name, metric=metric)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "made.py").write_text(MADE)
    options = ["red", "blue"]
    rows = [{"question": f"Box {i} is", "options": options, "answer": i % 2} for i in range(60)]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = TorchModel(taught(["Box is red"], 1))
    checks, notes = check_outside(
        model, model, tokenizer(), load_tasks([*metrics], tmp_path), TaskLimits(), 0.05, 64
    )
    found = {check.name: check for check in checks}
    assert {name: (check.status, check.required) for name, check in found.items()} == {
        "lm-eval aimless right": ("undecided", True), "lm-eval errorless": ("undecided", True),
        "lm-eval told right": ("passed", True),
    }  # fmt: skip
    assert "say higher_is_better" in found["lm-eval aimless right"].text
    assert len(notes) == 1
    assert notes[0].endswith("are not judged: errorless right")


def test_no_number_of_a_metric_is_no_pass_and_no_error_is_no_failure() -> None:
    """Where nothing was lost and nobody knew the error, P was 0; a metric without a number and
    without an error was left out, and the verdict passed over it."""
    fine = HarnessScore(
        task="t", metric="m", value=0.5, error=0.02, higher_is_better=True, items=60
    )
    for error in (0.02, None, math.nan):
        lost = _difference(fine, replace(fine, value=math.nan, error=error))
        assert lost
        assert _judged(fine, fine, lost, 0.1, 0.05).status == "failed"
    unsure = replace(fine, error=math.nan)
    assert _difference(fine, unsure) is _difference(unsure, fine) is None
    assert _difference(replace(fine, value=math.inf), fine) is None
    equal = _difference(fine, fine)
    assert equal
    assert _judged(fine, fine, equal, 0.1, 0.05).status == "passed"
