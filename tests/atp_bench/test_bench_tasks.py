"""`atp-edge bench tasks` on a tiny run: its three forms on the domain's tasks and lm-eval's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atp_bench import lm_eval_adapter, tasks
from atp_bench.tasks import score_run
from atp_export.export import export_onnx
from transformers import AutoTokenizer
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.narrow import narrow_model
from atp_edge.run.folder import RunFolder
from tests.tiny import PLANS, Silent, dense_run, record

TASK = """
task: clauses
dataset_path: json
dataset_kwargs: {data_files: {test: clauses.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> RunFolder:
    """A run as training and export leave it, of an untrained model."""
    folder = tmp_path_factory.mktemp("bench-tasks")
    run = dense_run(folder, real_folder)
    tokenizer, dense = AutoTokenizer.from_pretrained(run.dense), load_narrow(run.dense)
    save_narrow(narrow_model(dense, PLANS["per-layer"](dense)), tokenizer, run.slim)
    export_onnx(run.slim, run.onnx)
    record(run, "train", "shrink", "export")
    return run


def bench_tasks(run: RunFolder, *arguments: str) -> str:
    command = ["bench", "tasks", "--out", str(run.path), *arguments]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_three_forms_are_scored_side_by_side(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "clauses.yaml").write_text(TASK)
    rows = [{"text": f"Clause {i} asks for a royalty of {i} percent."} for i in range(6)]
    (tmp_path / "clauses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "scores.json"
    shown = bench_tasks(
        run, "--items", "6", "--lm-eval", "clauses", "--include", str(tmp_path), "--json", str(file)
    )
    assert max(map(len, shown.splitlines())) <= 80
    found = json.loads(file.read_text())
    for kind in ("domain", "outside"):
        assert list(found[kind]) == ["dense", "slim", "onnx"]
        assert found[kind]["dense"] != found[kind]["slim"]
    for name, score in found["domain"]["slim"].items():
        assert name in shown
        assert len(score["per_item"]) == 6
        assert found["domain"]["onnx"][name]["per_item"] == score["per_item"]
    assert found["recovery"]["onnx"] == found["recovery"]["slim"]
    assert f"{found['recovery']['slim']['average']:.3f}" in shown
    outside = {form: rows["clauses byte_perplexity"] for form, rows in found["outside"].items()}
    dense, slim = outside["dense"]["value"], outside["slim"]["value"]
    assert outside["onnx"]["value"] == pytest.approx(slim, rel=1e-4)
    # Of a perplexity less is better: recovery is dense over slim.
    assert f"{dense:.3f}" in shown
    assert f"{dense / slim:.3f}" in shown


def test_no_form_reads_beyond_the_exported_context(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = RunFolder(tmp_path)
    shutil.copytree(run.path, short.path, dirs_exist_ok=True)
    export_onnx(short.slim, short.onnx, context=80)
    record(short, "export")
    windows: list[int] = []

    def harness(*_: Any, window: int) -> Any:
        windows.append(window)
        return SimpleNamespace(notes=["3 prompts were cut"])

    monkeypatch.setattr(lm_eval_adapter, "HarnessModel", harness)
    monkeypatch.setattr(lm_eval_adapter, "harness_scores", lambda *_, **__: [])
    monkeypatch.setattr(tasks, "evaluate", lambda *_: {})
    monkeypatch.setattr(tasks, "recovery_where_able", lambda *_: None)
    progress = Silent()
    score_run(short, progress, items=20, outside=["a task"])
    assert windows == [80, 80, 80]
    said = progress.said
    assert re.match(r"left out, longer than the 80 tokens that are read: \d+ items", said[0])
    assert said.count("3 prompts were cut") == 1
    with pytest.raises(ValueError, match=r"nothing is left to ask \(left out, longer than the 20"):
        tasks.tasks_of(short.config(), 1, 20)


def test_what_is_not_there_is_said_before_anything_is_scored(run: RunFolder) -> None:
    hidden = run.onnx.rename(run.path / "hidden")
    with pytest.raises(
        ValueError, match=r"onnx is not there; write it with `atp-edge export --out"
    ):
        bench_tasks(run)
    hidden.rename(run.onnx)
    with pytest.raises(ValueError, match="name one with --lm-eval"):
        bench_tasks(run, "--include", str(run.path))
    with pytest.raises(ValueError, match="holds no run"):
        bench_tasks(RunFolder(run.path / "nowhere"))
