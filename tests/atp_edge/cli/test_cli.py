"""The command line as users meet it: a whole small run, killed and gone on with, and its errors."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from atp_export.manifest import verify_manifest
from transformers import AutoTokenizer

from atp_edge.cli import main
from atp_edge.model.checkpoint import save_narrow
from atp_edge.pipeline import export_to
from atp_edge.run.files import file_lock
from atp_edge.run.hashes import files_sha256
from tests.tiny import QUICK_GATE, save_tiny_source, tiny_model

SMALL = [
    "--steps", "12", "--dataset-block-tokens", "32", "--dataset-test-blocks", "4",
    "--train-save-every", "3", "--train-precision", "no", "--decision-width-multiple", "4",
    "--decision-importance-blocks", "2", "--recovery-reconstruct-blocks", "4",
    "--recovery-approach-blocks", "4",
    "--bench-rounds", "1", "--bench-prompt-tokens", "8", "--bench-new-tokens", "4",
    "--gate-config", QUICK_GATE,
]  # fmt: skip


def atp_edge(*arguments: str, code: int = 0) -> str:
    """Run the command here, where all that it imports is imported; returns stdout and stderr
    together."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
        patch.setattr(sys, "argv", ["atp-edge", *arguments])
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code, shown.getvalue()
    return shown.getvalue()


def in_a_process(*arguments: str, code: int = 0) -> str:
    """`atp_edge` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from atp_edge.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny random Llama, and JSONL text."""
    folder = tmp_path_factory.mktemp("user")
    save_tiny_source(folder)
    return str(folder / "model"), str(folder / "data.jsonl")


@pytest.fixture(scope="module")
def finished(model_and_data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    model, data = model_and_data
    out = tmp_path_factory.mktemp("runs") / "whole"
    in_a_process("run", "--model", model, "--data", data, "--out", str(out), *SMALL)
    return out


def test_a_run_leaves_every_file_of_the_folder(finished: Path) -> None:
    for name in ("config.toml", "plan.json", "slim/config.json", "slim/model.safetensors",
                 "onnx/model.onnx", "onnx/genai_config.json",
                 "onnx/manifest.json", "onnx/tokenizer.json", "metrics.json",
                 "history.jsonl"):  # fmt: skip
        assert (finished / name).is_file(), name
    metrics = json.loads((finished / "metrics.json").read_text())
    worth = metrics["train"]["adapter"]["written"]
    assert (finished / "adapter" / "adapter_config.json").is_file() == worth
    assert all(proof["passed"] for proof in metrics["verify"]["providers"].values())
    assert metrics["shrink"]["decoder_share"] <= 0.6
    assert metrics["train"]["masked_narrow_max_error"] < 1e-3
    assert metrics["shrink"]["perplexity"] == pytest.approx(
        metrics["train"]["perplexity"], rel=0.01
    )


def test_the_report_is_one_self_contained_page_of_all_figures(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="https?://', page.rsplit("</script>", 1)[-1])
    for title in ("Loss", "Kept share", "Width of every layer", "Latency and memory",
                  "ONNX against PyTorch", "first token", "peak memory"):  # fmt: skip
        assert title in page, title


def test_an_adapter_is_judged_on_the_dense_model(finished: Path) -> None:
    """It loads by plain peft where it is written: tests/atp_edge/training/test_dense_adapter.py."""
    judged = json.loads((finished / "metrics.json").read_text())["train"]["adapter"]
    assert judged["blocks"] > 0
    assert judged["written"] == (judged["share"] >= 0.5)
    assert judged["written"] or "of what tuning that model buys" in judged["why"]


def test_generate_looks_at_what_was_shipped(finished: Path, tmp_path: Path) -> None:
    """Its size always; every byte of it when asked."""
    folder = tmp_path / "onnx"
    shutil.copytree(finished / "onnx", folder)
    asked = ["generate", "The licence", "--out", str(folder), "--max-new-tokens", "2"]
    data = folder / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:100] + bytes(9) + content[109:])
    shown = atp_edge(*asked, "--check", code=2)
    assert "model.onnx.data is not what was shipped" in " ".join(shown.split())
    data.write_bytes(content + b"x")
    shown = " ".join(atp_edge(*asked, code=2).split())
    assert f"({len(content) + 1} bytes) is not what was shipped ({len(content)} bytes)" in shown
    assert "Traceback" not in shown


def test_generate_refuses_a_run_whose_model_was_changed(finished: Path) -> None:
    data = finished / "onnx" / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:100] + bytes(9) + content[109:])
    try:
        shown = atp_edge("generate", "The licence", "--out", str(finished), code=2)
    finally:
        data.write_bytes(content)
    assert "onnx/model.onnx.data changed" in " ".join(shown.split())


def test_a_finished_run_is_not_run_again(finished: Path, model_and_data: tuple[str, str]) -> None:
    model, data = model_and_data
    before = (finished / "onnx" / "model.onnx").stat().st_mtime_ns
    shown = atp_edge("run", "--model", model, "--data", data, "--out", str(finished), *SMALL)
    assert "train: done before" in shown
    assert (finished / "onnx" / "model.onnx").stat().st_mtime_ns == before
    refused = atp_edge("run", "--model", model, "--data", data, "--out", str(finished), "--seed",
                       "7", *SMALL, code=2)  # fmt: skip
    assert "holds a run of another configuration (seed = 0 there, seed = 7 here)" in refused


def test_a_run_that_another_process_works_on_is_left_alone(finished: Path) -> None:
    config = ["--config", str(finished / "config.toml")]
    with file_lock(finished):
        for command in (["run", *config], ["shrink", "--out", str(finished)]):
            assert f"another process works on {finished}" in in_a_process(*command, code=2)
    assert "train: done before" in atp_edge("run", *config)


def test_stages_run_again_alone_and_the_model_talks(finished: Path) -> None:
    for stage in ("shrink", "export", "verify", "report"):
        atp_edge(stage, "--out", str(finished))
    said = atp_edge("generate", "The licence", "--out", str(finished), "--max-new-tokens", "4")
    assert said.startswith("The licence")
    assert "every file is what was shipped" in atp_edge(
        "verify", "--manifest", str(finished / "onnx")
    )


def test_rounding_is_measured_by_quantizer_and_reported(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "rounding.json"
    shown = atp_edge("bench", "rounding", "--out", str(finished), "--json", str(file))
    figures = json.loads(file.read_text())
    assert [row["quantizer"] for row in figures["rows"]] == ["nearest", "k-quant", "gptq"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["rounding"] == figures
    assert figures["fp32_perplexity"] == pytest.approx(metrics["shrink"]["perplexity"], rel=1e-5)
    assert figures["blocks"] == 4
    for row in figures["rows"]:
        assert row["ratio"] == pytest.approx(row["onnx_perplexity"] / figures["fp32_perplexity"])
        # Random weights: rounding changes the perplexity a little, in either direction.
        assert 0.8 < row["ratio"] < 1.25
        assert row["ratio"] != 1
        assert f"{row['ratio']:.4f}x" in shown
    atp_edge("report", "--out", str(finished))
    page = (finished / "report.html").read_text()
    assert "What rounding the weights costs" in page
    assert "int4, gptq" in page


@pytest.mark.parametrize(("precision", "quantizer"), [("int4", "gptq"), ("int8", "nearest")])
def test_a_run_rounds_by_the_quantizer_that_its_precision_wants(
    finished: Path, tmp_path: Path, precision: str, quantizer: str
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    settings = (copied / "config.toml").read_text()
    assert 'precision = "fp32"' in settings
    (copied / "config.toml").write_text(
        settings.replace('precision = "fp32"', f'precision = "{precision}"')
    )
    atp_edge("export", "--out", str(copied))
    assert verify_manifest(copied / "onnx")["quantizer"] == quantizer
    atp_edge("verify", "--out", str(copied))


def test_a_run_may_cut_rope_pairs_instead_of_heads(
    model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    """The whole run, verification too. Heads of 32 dimensions keep 16 of them, or all."""
    tokenizer = AutoTokenizer.from_pretrained(model_and_data[0])
    save_narrow(
        tiny_model("llama", tied=True, vocab_size=len(tokenizer), head_dim=32),
        tokenizer,
        tmp_path / "model",
    )
    out = tmp_path / "run"
    atp_edge("run", "--model", str(tmp_path / "model"), "--data", model_and_data[1],
             "--out", str(out), "--decision-space", "head-dims", "--budget", "params=0.5",
             *SMALL)  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(proof["passed"] for proof in metrics["verify"]["providers"].values())
    assert metrics["shrink"]["decoder_share"] <= 0.5
    assert metrics["train"]["masked_narrow_max_error"] < 1e-3
    layers = json.loads((out / "slim" / "config.json").read_text())["per_layer_config"].values()
    assert {layer["num_attention_heads"] for layer in layers} == {6}
    assert 16 in {layer["head_dim"] for layer in layers}
    assert json.loads((out / "plan.json").read_text())["space"] == "head-dims"
    # Its values are in another basis than the dense model's: an adapter would not fit that.
    assert not (out / "adapter").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_there_was_of_another_form(
    finished: Path, tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("export", "--out", str(finished), "--to", str(tmp_path / "to"))
    for there in (False, True):
        if there:
            with monkeypatch.context() as patch:
                patch.setattr(export_to, "prove", lambda *_, **__: {})
                atp_edge(*to)
        before = files_sha256(tmp_path, ["to"])
        with monkeypatch.context() as patch:
            patch.setattr(export_to, "prove", lambda *_, **__: os.kill(os.getpid(), number))
            said = " ".join(atp_edge(*to, code=code).split())
        assert "Traceback" not in said
        assert said.endswith(" done; the same command does the rest")
        assert files_sha256(tmp_path, ["to"]) == before
        assert [p.name for p in tmp_path.iterdir()] == ["to"] * bool(before) == ["to"] * there
    atp_edge("report", "--out", str(finished))


def test_killed_anywhere_a_run_goes_on_and_ends_the_same(
    finished: Path, model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    model, data = model_and_data
    out = tmp_path / "killed"
    command = [sys.executable, "-c", "from atp_edge.cli import main; main()", "run", "--model",
               model, "--data", data, "--out", str(out), *SMALL]  # fmt: skip
    history = out / "history.jsonl"
    marks: list[Callable[[], bool]] = [
        history.exists,
        lambda: '"control"' in history.read_text(),
        (out / "plan.json").exists,
        (out / "onnx-dense").exists,
    ]
    for i, reached in enumerate(marks):
        with (tmp_path / f"said-{i}").open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        while not reached() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if i else signal.SIGTERM)
        assert process.wait() == (-signal.SIGKILL if i else 128 + signal.SIGTERM)
    stopped = (tmp_path / "said-0").read_text()
    assert f"go on with `atp-edge run --config {out / 'config.toml'}`" in stopped
    assert re.search(r"stopped by SIGTERM: saved: (dense baseline|joint) up to step \d+;", stopped)
    # Gone on with in the joint loop: the layers are moved at the freeze, not at the start again.
    assert (tmp_path / "said-2").read_text().count("matching the layers") < 2
    said = in_a_process("run", "--model", model, "--data", data, "--out", str(out), *SMALL)
    assert "WARNING" not in said  # Of a library that the user cannot act upon.
    assert (out / "plan.json").read_text() == (finished / "plan.json").read_text()
    weights = "slim/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--budget", "params=0.001"], "the smallest budget for this model is params="),
        (["run", "--budget", "tiny"], "budget 'tiny': expected params=SHARE"),
        (["run", "--export-precision", "bf16"], "a whole run proves what it ships"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["train", "--model", "/no/folder"], "model '/no/folder': no config.json there; expected"),
        (["shrink", "--out", "nowhere"], "nowhere holds no run"),
        (
            ["generate", "x", "--out", "nowhere"],
            "nowhere is no folder; expected a run's folder",
        ),
        (
            ["bench", "rounding", "--out", "x", "--quantizer", "awq"],
            "expected nearest, k-quant, gptq",
        ),
        (["bench", "--precision", "int4"], "--precision int4 goes with --peers"),
        (["verify"], "either --out RUN (and --folder) or --manifest FOLDER"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: list[str], message: str, model_and_data: tuple[str, str]
) -> None:
    more = ["--model", model_and_data[0]] if arguments[0] == "run" else []
    shown = atp_edge(*arguments, *more, code=2)
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("stage", "before"),
    [("shrink", "train --config"), ("export", "shrink --out"), ("verify", "export --out"),
     ("bench", "export --out")],
)  # fmt: skip
def test_a_stage_before_its_turn_says_what_to_run_first(
    stage: str, before: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copy(finished / "config.toml", tmp_path)
    shown = " ".join(atp_edge(stage, "--out", str(tmp_path), code=2).split())
    assert f"has not ended; run `atp-edge {before} {tmp_path}" in shown
    assert "Traceback" not in shown


def test_a_condition_that_is_not_met_ends_with_code_4(finished: Path) -> None:
    """After the report is written, as all else is done."""
    shown = atp_edge("report", "--out", str(finished), "--require", "recovery>=99", code=4)
    assert "report.html" in shown
    assert "required and not met: recovery>=99: recovery is " in shown


def test_json_lines_are_all_that_a_machine_reads(finished: Path) -> None:
    """Of a run that is done, gone on with: stages, what is said, and the end with every figure. In
    a process of its own: here transformers was imported before its bars were switched off."""
    shown = in_a_process("run", "--config", str(finished / "config.toml"), "--log", "json")
    lines = [json.loads(line) for line in shown.splitlines()]
    assert {"stage", "say", "end"} <= {line["event"] for line in lines}
    assert next(x["name"] for x in lines if x["event"] == "stage") == "train"
    assert lines[-1]["metrics"] == json.loads((finished / "metrics.json").read_text())
    assert "on its domain" in lines[-1]["verdict"]


def test_a_condition_that_is_none_is_refused_before_anything(tmp_path: Path) -> None:
    shown = atp_edge("run", "--out", str(tmp_path / "x"), "--require", "recovry>=0.9", code=2)
    assert "did you mean 'recovery'?" in shown
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_costs_and_writes_nothing(
    model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "dry"
    shown = atp_edge("run", "--model", model_and_data[0], "--out", str(out), "--dry-run", *SMALL)
    assert "decoder parameters" in shown
    assert "context, tokens" in shown
    assert "before the joint steps" in shown
    assert not out.exists()


def test_a_dry_run_for_machines_is_json_lines_alone(
    model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    model, data = model_and_data
    shown = in_a_process("run", "--model", model, "--data", data, "--out", str(tmp_path / "dry"),
                         "--dry-run", "--log", "json", *SMALL)  # fmt: skip
    lines = [json.loads(line) for line in shown.splitlines()]
    needs = next(line for line in lines if line["event"] == "needs")
    parts = {part["part"]: part for part in needs["parts"]}
    assert parts["joint steps"]["device"]["weights"] > 0
    assert any(line["event"] == "say" and "time, roughly" in line["text"] for line in lines)


def test_a_gpu_elsewhere_is_for_a_dry_run_and_shares_out_its_steps(
    model_and_data: tuple[str, str], tmp_path: Path
) -> None:
    """Else this machine would train with what was chosen for the other one."""
    model, data = model_and_data
    asked = ["--model", model, "--data", data, "--out", str(tmp_path / "run"), *SMALL]
    for command in ("run", "train"):
        shown = atp_edge(command, *asked, "--device-memory", "80GB", code=2)
        assert "--device-memory 80GB is of a GPU elsewhere" in " ".join(shown.split())
    eight = ["--dry-run", "--device-memory", "8x80GB"]
    shown = atp_edge("run", *asked, *eight, code=2)
    assert "batch_blocks = 1 on 8 ranks: expected a multiple" in " ".join(shown.split())
    shown = atp_edge("run", *asked, *eight, "--train-batch-blocks", "8")
    assert "each of 8 GPUs of 80GB" in " ".join(shown.split())
    assert not (tmp_path / "run").exists()


def test_doctor_and_help_fit_80_columns() -> None:
    for arguments in (["doctor"], ["run", "--help"], ["--help"]):
        assert max(map(len, atp_edge(*arguments).splitlines())) <= 80


def test_help_is_shown_without_importing_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from atp_edge.cli import app; "
        "result = CliRunner().invoke(app, ['run', '--help']); "
        "sys.exit(result.exit_code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
