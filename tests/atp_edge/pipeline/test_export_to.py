"""A finished run's slim model in another form: written, proven, measured; nothing else moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atp_export.export import export_onnx
from atp_export.gguf.llama_cpp import node_folder
from atp_export.manifest import read_manifest, verify_manifest
from gguf import GGUFReader
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.loading import load_tokenizer
from atp_edge.model.narrow import narrow_model
from atp_edge.pipeline import export_gguf
from atp_edge.pipeline import verify as proof
from atp_edge.pipeline.inputs import inputs_of
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256
from atp_edge.run.pinned import pin_sources
from tests.tiny import PLANS, QUICK_TO_TRAIN, dense_run, record

QUICK = QUICK_TO_TRAIN | {
    "bench.rounds": 1, "bench.prompt_tokens": 4, "bench.new_tokens": 2, "dataset.test_blocks": 1,
}  # fmt: skip

# What provenance and the model card say of a training that there was not.
TRAINED: dict[str, Any] = {
    "plan_sha256": "p", "tokens": 1, "decoder_share": 0.5, "whole_share": 0.9, "perplexity": 3.0,
    "untuned_perplexity": 4.0, "dense_tuned_perplexity": 2.0,
    "data": {"sha256": "d", "documents": {"train": 1}, "tokens": {"train": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> RunFolder:
    """A run of a tiny model, cut and not trained."""
    run = dense_run(tmp_path_factory.mktemp("whole"), real_folder, **QUICK)
    dense = load_narrow(run.dense)
    save_narrow(narrow_model(dense, PLANS["per-layer"](dense)), load_tokenizer(run.dense), run.slim)
    run.add_metrics("train", TRAINED)
    record(run, "tune_dense", "shrink")
    for source, target in ((run.dense, run.onnx_dense), (run.slim, run.onnx)):
        export_onnx(source, target)
    run.add_metrics("export", {"flavour": "ort"})
    record(run, "export")
    pin_sources(run.path, inputs_of(run.config()), print)
    return run


@pytest.fixture(scope="module")
def written(finished: RunFolder) -> Path:
    """The run's slim model in int4, exported by the command."""
    to = finished.path / "forms" / "int4"
    before = content(finished.path)
    shown = call("export", "--out", finished.path, "--to", to, "--precision", "int4",
                 "--flavour", "portable")  # fmt: skip
    assert "equal to PyTorch on CPUExecutionProvider" in shown
    assert {k: v for k, v in content(finished.path).items() if not k.startswith("forms")} == before
    return to


def call(*arguments: Any) -> str:
    """A command in this process; returns what it printed. Raises what it raises."""
    done = CliRunner().invoke(
        app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "300"}
    )
    assert done.exit_code == 0, done.output
    return done.output


def content(folder: Path) -> dict[str, str]:
    return files_sha256(folder, ["."]) if folder.exists() else {}


def test_the_folder_is_what_was_asked_for_with_its_proof_and_its_figures(
    finished: RunFolder, written: Path
) -> None:
    provenance = verify_manifest(written)
    assert (provenance["precision"], provenance["flavour"]) == ("int4", "portable")
    assert provenance["quantizer"] == "gptq"
    figures = json.loads((written / "figures.json").read_text())
    (proof,) = figures["providers"].values()
    assert proof["passed"]
    assert proof["greedy_total"] > 0
    assert figures["bytes"] < 0.4 * (finished.onnx / "model.onnx.data").stat().st_size
    assert 0.9 < figures["quality"]["ratio"] < 1.2
    assert set(figures["bench"]["rows"]) == {"dense", "this"}


def test_verify_bench_and_generate_take_the_folder(finished: RunFolder, written: Path) -> None:
    assert "equal to PyTorch" in call("verify", "--out", finished.path, "--folder", written)
    file = finished.path.parent / "bench.json"
    call("bench", "--out", finished.path, "--folder", written, "--json", file)
    assert set(json.loads(file.read_text())["rows"]) == {"dense", "slim", str(written)}
    assert call("generate", "The licence", "--out", written, "--max-new-tokens", "2")


def test_a_second_export_replaces_the_first(finished: RunFolder, tmp_path: Path) -> None:
    to = tmp_path / "again"
    for precision in ("fp32", "fp16"):
        call("export", "--out", finished.path, "--to", to, "--precision", precision)
    assert verify_manifest(to)["precision"] == "fp16"
    assert not [p.name for p in tmp_path.iterdir() if p != to]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int4"], r"--precision int4 goes with --to DIR"),
        (["--to", "{tmp}/x", "--precision", "q4"], r"--precision q4: for ONNX expected fp32"),
        (["--to", "{tmp}/x", "--flavour", "openvino"], r"--flavour openvino: for ONNX expected"),
        (["--to", "{tmp}/x", "--precision", "fp32", "--quantizer", "gptq"], r"rounds int8 and"),
        (["--to", "{tmp}/x", "--context", "16"], r"test blocks of 32 tokens; take 32 or more"),
        (["--to", "{tmp}/x", "--format", "gguf", "--precision", "int4"], r"'int4': expected f32"),
        (["--to", "{tmp}/x", "--format", "gguf", "--flavour", "ort"], r"--flavour ort is of ONNX"),
        (["--to", "{tmp}/x", "--format", "gguf", "--context", "16"], r"of 32 tokens; take 32"),
        (["--to", "{tmp}/x", "--layout", "transformers.js", "--precision", "bf16"], r"with bf16"),
        (["--to", "{tmp}/x", "--layout", "openvino", "--flavour", "ort"], r"made from portable"),
        (["--to", "{tmp}/x", "--format", "openvino"], r"give it as --layout openvino"),
        (["--to", "{tmp}/x", "--layout", "gguf"], r"that is a format; give it as --format gguf"),
        (["--to", "{tmp}/x", "--format", "ggml"], r"--format ggml: expected onnx, gguf"),
        (["--to", "{tmp}/x", "--context", "9999"], r"the model was made for 256; .* --context\)"),
        (["--to", "{run}/onnx"], r"the run keeps its own there"),
        (["--to", "{run}"], r"the run keeps its own there"),
        (["--to", "{tmp}"], r"mine\.txt is there, which no export wrote"),
        (["--to", "{tmp}/mine.txt"], r"is a file; name a folder"),
        (["--to", "{tmp}/other/onnx"], r"the run keeps its own there"),
        (["--to", "{tmp}/other/onnx/deeper"], r"the run keeps its own there"),
    ],
)
def test_a_wrong_call_leaves_nothing_behind(
    finished: RunFolder, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    for name in ("config.toml", "onnx"):
        (tmp_path / "other" / name).symlink_to(finished.path / name)
    before = content(finished.path), content(tmp_path)
    named = [x.format(tmp=tmp_path, run=finished.path) for x in arguments]
    with pytest.raises(ValueError, match=message):
        call("export", "--out", finished.path, *named)
    assert (content(finished.path), content(tmp_path)) == before
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", "other"}


def test_a_link_is_followed(finished: RunFolder, tmp_path: Path) -> None:
    """To a folder on another disk, say, before it is there too."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    call("export", "--out", finished.path, "--to", tmp_path / "link", "--precision", "fp16")
    assert verify_manifest(tmp_path / "real")["precision"] == "fp16"
    assert {p.name for p in tmp_path.iterdir()} == {"link", "real"}
    assert (tmp_path / "link").is_symlink()


def test_what_is_not_proven_does_not_get_its_name(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "form"
    call("export", "--out", finished.path, "--to", to)
    before = content(to)
    dense = load_narrow(finished.slim)
    for parameter in dense.model.layers[1].mlp.parameters():
        parameter.data *= 1.1
    monkeypatch.setattr(proof, "load_narrow", lambda folder: dense)
    with pytest.raises(NotProvenError, match=f"{to} does not equal {finished.slim}"):
        call("export", "--out", finished.path, "--to", to, "--precision", "fp16")
    assert content(to) == before
    assert [p.name for p in tmp_path.iterdir()] == ["form"]


def test_a_folder_of_another_slim_model_is_refused(
    finished: RunFolder, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    (copy.slim / "generation_config.json").write_text("{}")
    asked = ("--out", copy.path, "--folder", written)
    with pytest.raises(ValueError, match=r"was not written from .* as it is now"):
        call("verify", *asked)
    (copy.slim / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="slim is not what shrink wrote"):
        call("export", "--out", copy.path, "--to", tmp_path / "form")


@pytest.mark.parametrize("at_hand", [True, False])
def test_gguf_is_proven_by_llama_cpp_or_said_not_to_be(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_hand: bool
) -> None:
    if at_hand and node_folder() is None:
        pytest.skip("node-llama-cpp is not installed: `make test` installs it where npm is at hand")
    if not at_hand:
        monkeypatch.setattr("atp_export.gguf.llama_cpp.node_folder", lambda: None)
    to = tmp_path / "gguf"
    shown = call("export", "--out", finished.path, "--to", to, "--format", "gguf",
                 "--precision", "f32")  # fmt: skip
    assert ("same token ids" if at_hand else "not proven here") in shown
    provenance = verify_manifest(to)
    assert (provenance["format"], provenance["precision"]) == ("gguf", "f32")
    assert {"Modelfile", "figures.json", "model.gguf"} == set(read_manifest(to).files)
    assert json.loads((to / "figures.json").read_text())["quality"]["ratio"] == pytest.approx(
        1, rel=0.01
    )
    named = GGUFReader(to / "model.gguf").fields["general.name"].contents()
    assert named == "gguf"
    with pytest.raises(ValueError, match="proven and measured as it is written"):
        call("verify", "--out", finished.path, "--folder", to)
    with pytest.raises(ValueError, match=r"a GGUF file, which llama\.cpp and Ollama run"):
        call("generate", "The", "--out", to)


def test_a_transformers_js_folder_is_told_from_a_run(finished: RunFolder, tmp_path: Path) -> None:
    """Its model lies in onnx/, as a run's."""
    to = tmp_path / "js"
    shown = call("export", "--out", finished.path, "--to", to, "--layout", "transformers.js")
    assert "this in ONNX Runtime: first token" in shown
    for arguments in (("--out", to), ("--out", finished.path, "--fallback", to)):
        with pytest.raises(ValueError, match=r"js holds no model\.onnx but .* transformers\.js"):
            call("generate", "The", *arguments)


def test_an_openvino_folder_is_proven_by_openvino_genai(
    finished: RunFolder, tmp_path: Path
) -> None:
    pytest.importorskip("openvino_genai", reason="extra `openvino` is not installed")
    to = tmp_path / "openvino"
    shown = call("export", "--out", finished.path, "--to", to, "--layout", "openvino")
    assert "in openvino_genai" in shown
    assert not list(to.glob("model.onnx*"))
    assert {"openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"} <= set(
        read_manifest(to).files
    )
    figures = json.loads((to / "figures.json").read_text())
    assert [check["name"] for check in figures["openvino_genai"]] == ["ids", "greedy"]
    with pytest.raises(ValueError, match=r"no model\.onnx but the layout of openvino_genai"):
        call("generate", "The", "--out", to)
    with pytest.raises(ValueError, match="proven and measured as it is written"):
        call("verify", "--out", finished.path, "--folder", to)


@pytest.mark.parametrize(("same", "named"), [(1, True), (2, False)])
def test_prompts_that_part_are_named_where_there_are_any(same: int, named: bool) -> None:
    proof = SimpleNamespace(release="1", greedy_same=same, greedy_total=2, token_ms=1.0)
    assert ("the others part" in export_gguf._proven(proof)) == named
