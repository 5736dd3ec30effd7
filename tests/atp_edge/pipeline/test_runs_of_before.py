"""Runs stored by the code from before the modules moved: they are read and gone on with.

What lies in tests/stored_runs is never written again; see its README.md.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_export.manifest import verify_manifest
from atp_export.runtime import Generator, Session, generate_tokens
from transformers import AutoModelForCausalLM

import atp_edge  # noqa: F401  (its import lets transformers load per-layer widths)
from atp_edge.model.plan import read_plan
from atp_edge.run.folder import RunFolder

STORED = Path(__file__).parents[2] / "stored_runs"
EXPECTED: dict[str, Any] = json.loads((STORED / "expected.json").read_text())


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the stored runs elsewhere, to be read alone."""
    folder = tmp_path_factory.mktemp("stored") / "runs"
    shutil.copytree(STORED, folder)
    return folder


@pytest.fixture
def writable(tmp_path: Path) -> Path:
    """A copy of its own for a test that writes, the begun run's checkpoint unpacked."""
    folder = tmp_path / "runs"
    shutil.copytree(STORED, folder)
    packed = folder / "begun" / "checkpoint" / "state.pt.xz"
    packed.with_name("state.pt").write_bytes(lzma.decompress(packed.read_bytes()))
    packed.unlink()
    return folder


def call(*arguments: str, folder: Path) -> str:
    """Call `atp-edge` from a folder, on one thread; returns what it showed."""
    done = subprocess.run(
        [sys.executable, "-c", "from atp_edge.cli import main; main()", *arguments],
        cwd=folder,
        env=os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def close(value: Any) -> Any:
    """The same but for rounding; another kind of CPU rounds more of it differently."""
    same_cpu = torch.backends.cpu.get_cpu_capability() == EXPECTED["cpu"]
    return pytest.approx(value, rel=1e-6 if same_cpu else 1e-4)


def check_slim(run: Path, atol: float = 1e-5) -> None:
    """The slim checkpoint gives the stored logits, and its ONNX folder the stored tokens."""
    slim = AutoModelForCausalLM.from_pretrained(run / "slim", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = slim(torch.tensor([EXPECTED["ids"]])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), atol=atol, rtol=1e-5)
    new = generate_tokens(
        Session(run / "onnx", threads=1), [EXPECTED["ids"]], max_new_tokens=len(EXPECTED["greedy"])
    )
    assert new == [EXPECTED["greedy"]]


def test_the_plan_is_the_one_that_the_figures_name(copied: Path) -> None:
    run = RunFolder(copied / "finished")
    plan = read_plan(run.plan)
    assert plan.sha256 == run.metrics()["train"]["plan_sha256"] == EXPECTED["plan_sha256"]
    assert not plan.uniform


def test_the_slim_model_and_its_onnx_folder_load_and_say_the_same(copied: Path) -> None:
    check_slim(copied / "finished")
    onnx = copied / "finished" / "onnx"
    assert verify_manifest(onnx)["plan_sha256"] == EXPECTED["plan_sha256"]
    generator = Generator(onnx, threads=1)
    prompt = generator.tokenizer.decode(EXPECTED["ids"])
    said = generator.generate([prompt], max_new_tokens=len(EXPECTED["greedy"]))
    assert said == [generator.tokenizer.decode(EXPECTED["greedy"])]


def test_a_finished_run_counts_as_finished(writable: Path) -> None:
    shown = call("run", "--config", "finished/config.toml", folder=writable)
    for stage in ("train", "shrink", "export", "bench"):
        assert f"{stage}: done before" in shown
    # Its records are made of what is there, but for the proof: that is made anew.
    assert "comparing the slim ONNX model with PyTorch" in shown
    again = call("run", "--config", "finished/config.toml", folder=writable)
    assert "verify: done before" in again
    assert (writable / "finished" / "report.html").is_file()


def test_stages_of_a_finished_run_run_again(writable: Path) -> None:
    finished = RunFolder(writable / "finished")
    for folder in (finished.slim, finished.onnx):
        shutil.rmtree(folder)
    for stage in ("shrink", "export"):
        call(stage, "--out", "finished", folder=writable)
    check_slim(finished.path)
    assert finished.metrics()["shrink"]["perplexity"] == close(EXPECTED["slim_perplexity"])


def test_a_run_begun_before_goes_on_to_the_same_end(writable: Path) -> None:
    begun = RunFolder(writable / "begun")
    assert list(begun.parts()) == ["tune_dense"]
    shown = call("run", "--config", "begun/config.toml", folder=writable)
    # Gone on with from its checkpoint: only a joint phase at its start matches the layers too.
    assert shown.count("matching the layers") == 1
    assert read_plan(begun.plan).sha256 == EXPECTED["plan_sha256"]
    assert begun.plan.read_text() == (writable / "finished" / "plan.json").read_text()
    found = {name: part["perplexity"] for name, part in begun.parts().items()}
    assert found == close(EXPECTED["perplexities"])
    assert begun.metrics()["shrink"]["perplexity"] == close(EXPECTED["slim_perplexity"])
    # Tuned anew, the weights hold what a few steps make of the last digits.
    check_slim(begun.path, atol=1e-3)
