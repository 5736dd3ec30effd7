"""What a run leaves for others: end tokens, types, context, names, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from atp_export.manifest import verify_manifest
from atp_export.runtime import Generator
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.model.loading import load_model, stored_type
from tests.sources import edit, save_source
from tests.tiny_tokenizers import tokenizer_of

DATA = Path(__file__).parents[2] / "stored_runs" / "data.jsonl"
QUICK = [
    "--steps", "5", "--dataset-block-tokens", "16", "--dataset-test-blocks", "2",
    "--train-precision", "no", "--decision-width-multiple", "4", "--decision-importance-blocks",
    "2", "--recovery-reconstruct-blocks", "2", "--recovery-approach-blocks", "2", "--lora-rank",
    "2", "--bench-prompt-tokens", "8", "--bench-new-tokens", "4", "--budget", "params=0.8",
]  # fmt: skip
OWN, SHIPPED = 512, 128


def call(*arguments: str) -> str:
    """A command in this process; returns what it printed. Raises what it raises."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, two end tokens, no first token and no padding, a card that is not UTF-8."""
    folder = tmp_path_factory.mktemp("source") / "of a person"
    ends = tokenizer_of("byte-level", bos=False)
    save_source(
        folder, dtype=torch.bfloat16, bos_token_id=None, pad_token_id=None,
        max_position_embeddings=OWN, tokenizer=ends,
    )  # fmt: skip
    edit(folder / "generation_config.json", eos_token_id=[1, 3], temperature=0.9, do_sample=False)
    (folder / "README.md").write_bytes(b"---\nlicense: apache-2.0\n---\nCaf\xe9\n")
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, shrunk and exported for fewer tokens than the model was made for."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = ["--model", str(source), "--data", str(DATA), "--export-context", str(SHIPPED)]
    call("train", "--out", str(out), *settings, *QUICK)
    call("shrink", "--out", str(out))
    said = call("export", "--out", str(out))
    assert f"for {SHIPPED} tokens of the model's {OWN} (--export-context)" in " ".join(said.split())
    return out


def test_cards_are_shipped_and_every_file_has_the_mode_of_a_new_one(run: Path) -> None:
    for form in ("slim", "onnx"):
        card = (run / form / "README.md").read_text()
        assert "license: apache-2.0" in card
        assert str(run.parent) not in card
        assert "of a person" in card  # The model's name, not where it lay.
    assert "README.md" in verify_manifest_files(run / "onnx")
    new = run / "new"
    new.touch()
    modes = {f.stat().st_mode for f in run.rglob("*") if f.is_file() and f.suffix != ".lock"}
    assert modes == {new.stat().st_mode}
    new.unlink()


def verify_manifest_files(folder: Path) -> set[str]:
    verify_manifest(folder)
    return set(read(folder / "manifest.json")["files"])


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_checkpoints_are_in_the_type_of_the_source(run: Path) -> None:
    for form in ("dense", "slim"):
        assert stored_type(run / form) == torch.bfloat16
        assert read(run / form / "config.json")["torch_dtype"] == "bfloat16"
    sizes = read(run / "metrics.json")["shrink"]
    for form in ("dense", "slim"):
        assert sizes[form]["bytes"] == pytest.approx(2 * sizes[form]["parameters"], rel=0.1)


def test_what_is_measured_of_the_dense_model_is_true_of_its_checkpoint(run: Path) -> None:
    """Its weights were rounded first: on disk they are what was measured."""
    dense = load_model(run / "dense")
    for parameter in dense.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_every_end_token_ends_a_text(source: Path, run: Path) -> None:
    expected = read(source / "generation_config.json")
    for folder in ("dense", "slim", "onnx"):
        assert read(run / folder / "generation_config.json") == expected
    assert read(run / "onnx" / "genai_config.json")["model"]["eos_token_id"] == [1, 3]
    assert Generator(run / "onnx").ends == {1, 3}


def test_special_tokens_that_the_model_has_not_are_left_out(run: Path) -> None:
    described = read(run / "onnx" / "genai_config.json")["model"]
    assert "bos_token_id" not in described
    assert described["pad_token_id"] == 1
    genai = pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    tokenizer = genai.Tokenizer(genai.Model(str(run / "onnx")))
    text = "You may copy and sell it."
    ours = Generator(run / "onnx").tokenizer(text)["input_ids"]
    assert tokenizer.encode(text).tolist() == ours


def test_the_context_is_said_alike_everywhere(run: Path) -> None:
    described = read(run / "onnx" / "genai_config.json")
    assert described["model"]["context_length"] == described["search"]["max_length"] == SHIPPED
    assert read(run / "onnx" / "config.json")["max_position_embeddings"] == SHIPPED
    assert Generator(run / "onnx").session.context == SHIPPED
    assert read(run / "slim" / "config.json")["max_position_embeddings"] == OWN


def test_the_licence_is_read_whatever_the_card_is_written_in(run: Path) -> None:
    assert verify_manifest(run / "onnx")["licence"] == "apache-2.0"


def test_nothing_that_ships_names_this_machine(source: Path, run: Path) -> None:
    told = [str(source.parent), str(run.parent), str(Path.home())]
    for folder in ("dense", "slim", "onnx", "onnx-dense", "adapter"):
        for path in sorted((run / folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                assert not [t for t in told if t.encode() in content], path


def test_a_kept_adapter_names_no_machine_and_is_the_same_every_time(
    source: Path, run: Path
) -> None:
    edit_toml = run / "config.toml"
    settings = edit_toml.read_text()
    edit_toml.write_text(settings.replace("keep_adapter = false", "keep_adapter = true"))
    contents = []
    for _ in range(2):
        call("shrink", "--out", str(run))
        folder = run / "slim" / "adapter"
        contents.append({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["adapter_config.json", "adapter_model.safetensors"]
    config = read(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])
    test_nothing_that_ships_names_this_machine(source, run)
    edit_toml.write_text(settings)
