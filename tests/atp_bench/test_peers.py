"""Comparing with other engines: cuts, bytes a token moves, the engines, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atp_bench.engines import GENAI, open_engine
from atp_bench.engines.genai import build
from atp_bench.peers.compare import Models, bytes_per_step, compare
from atp_bench.peers.table import comparison_table
from atp_bench.peers.targets import targets_of
from atp_bench.peers.untrained_cut import cut, cut_plan
from atp_export.export import export_onnx
from atp_export.runtime import Session, generate_tokens
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.cli.bench_method import console
from atp_edge.config import Config, WidthsPolicy
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import LayerShape, ModelShape, model_shape
from atp_edge.model.plan import narrow_shape, shares
from atp_edge.settings import to_toml, with_values
from tests.tiny import tiny_model

SMOLLM2 = ModelShape(
    family="llama",
    hidden=576,
    vocabulary=49152,
    tied=True,
    layers=(LayerShape(heads=9, kv_heads=3, head_dim=64, channels=1536),) * 30,
    biased=frozenset(),
    norm_eps=1e-5,
)


@pytest.mark.parametrize("policy", ["uniform", "per-layer"])
def test_a_cut_keeps_just_below_its_share(policy: WidthsPolicy) -> None:
    plan = cut_plan(SMOLLM2, 0.6, policy)
    slim = narrow_shape(SMOLLM2, plan)
    assert 0.58 < shares(SMOLLM2, slim).decoder <= 0.6
    assert all(layer.channels % 32 == 0 for layer in slim.layers)
    assert plan.uniform == (policy == "uniform")
    assert (len({layer.kv_heads for layer in slim.layers}) == 1) == (policy == "uniform")


def test_a_share_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        cut_plan(SMOLLM2, 0.2, "uniform")


def test_bytes_per_step_are_the_matrices_and_the_cache(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_narrow(model, None, tmp_path / "dense")
    export_onnx(tmp_path / "dense", tmp_path / "onnx")
    shape = model_shape(model.config)
    embedding = 4 * shape.vocabulary * shape.hidden
    weights = sum(p.numel() for p in model.parameters()) * 4 - embedding
    cache = 4 * 10 * sum(2 * layer.kv_heads * layer.head_dim for layer in shape.layers)
    found = bytes_per_step(tmp_path / "onnx", 10)
    # Above: positions and masks, a few numbers; nothing like a matrix.
    assert weights + cache <= found < weights + cache + 500


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flavour", ["ort", "standard", "portable"])
def test_bytes_per_step_of_levels_leave_out_the_embedding(
    tmp_path: Path, flavour: Any, tied: bool
) -> None:
    """A token reads a row of it, whether it is a table of its own or the head's levels."""
    model = tiny_model("llama", tied=tied, hidden_size=96, intermediate_size=64, vocab_size=512)
    save_narrow(model, None, tmp_path / "dense")
    export_onnx(tmp_path / "dense", tmp_path / "onnx", precision="int4", flavour=flavour)
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name) + 512 * 96
    # Half a byte a weight, four bytes a block of 32; norms in fp32.
    weights = matrices * (16 + 4) // 32 + 7 * 96 * 4
    found = bytes_per_step(tmp_path / "onnx", 0)
    assert weights <= found < weights + 1000


@pytest.mark.parametrize("engine", ["atp-edge", GENAI])
def test_engines_generate_what_the_model_says(tmp_path: Path, engine: str) -> None:
    if engine == GENAI:
        pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    save_narrow(tiny_model("llama"), None, tmp_path / "dense")
    export_onnx(tmp_path / "dense", tmp_path / "onnx")
    prompts = [[1, 2, 3], [7, 5, 4]]
    expected = generate_tokens(Session(tmp_path / "onnx"), prompts, max_new_tokens=5)
    run: Any = open_engine(engine, tmp_path / "onnx", 1).start(2, 8)
    run.first(np.array(prompts))
    tokens = [_chosen(run)]
    for _ in range(4):
        run.next()
        tokens.append(_chosen(run))
    assert np.transpose(tokens).tolist() == expected


def _chosen(run: Any) -> list[int]:
    """Every row's last token."""
    tokens = run.tokens if hasattr(run, "tokens") else run.generator.get_next_tokens()
    return np.ravel(tokens).tolist()


def test_unknown_engines_and_precisions_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'vllm' is not an engine known here"):
        open_engine("vllm", tmp_path, 1)
    with pytest.raises(ValueError, match="writes no bf16"):
        build(tmp_path, tmp_path, "bf16")
    models = Models(dense=tmp_path, slims={}, note="")
    with pytest.raises(ValueError, match=r"--peers 'vllm' is not known; expected onnxruntime"):
        compare(models, "fp32", peers=["vllm"], prompt_tokens=1, new_tokens=1, batch=1, rounds=1,
                threads=1, say=str)  # fmt: skip


def test_a_whole_comparison(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    model = tiny_model("llama", hidden_size=96, intermediate_size=512, max_position_embeddings=1024)
    save_narrow(model, None, tmp_path / "dense")
    tokenizer_for(tmp_path / "dense")
    kept = cut(tmp_path / "dense", tmp_path / "slim", 0.6, "uniform")
    assert kept == pytest.approx(0.6, abs=0.05)
    assert load_narrow(tmp_path / "slim").config.intermediate_size < 512
    models = Models(dense=tmp_path / "dense", slims={"slim": tmp_path / "slim"}, note="cut")
    found = compare(models, "fp32", peers=[GENAI], prompt_tokens=8, new_tokens=4, batch=2,
                    rounds=1, threads=1, say=str)  # fmt: skip
    # The targets are of one row.
    assert not found["asked"]
    assert set(found["rows"]) == {f"{GENAI} dense", "dense", "slim"}
    bound = found["bounds"][f"{GENAI} dense : slim"]
    reached = found["pairs"][f"{GENAI} dense : slim"]["token_ms_p50"]
    assert bound["bound"] > 1
    assert bound["share"] == pytest.approx(reached / bound["bound"])
    first = found["first_token"]
    assert set(first["ms"]) == {"dense", "slim"}
    assert first["rounds"] > 1
    low, high = first["pairs"]["dense : slim"]["quartiles"]
    assert low <= first["pairs"]["dense : slim"]["median"] <= high
    caption = str(comparison_table("fp32", found).caption)
    assert f"slim against {GENAI} dense: decode {reached:.2f}x" in caption
    assert f"quartiles {low:.2f} to {high:.2f}" in caption


FOUND: dict[str, Any] = {
    "rows": dict.fromkeys(("genai dense", "dense", "slim")),
    "pairs": {
        "genai dense : dense": {"token_ms_p50": 1.02, "peak_memory_bytes": 1.1},
        "genai dense : slim": {"token_ms_p50": 1.30, "peak_memory_bytes": 0.9},
    },
    "bounds": {"genai dense : slim": {"bound": 1.46, "share": 0.89}},
    "first_token": {
        "prompt_tokens": 512,
        "pairs": {"dense : slim": {"median": 1.4, "quartiles": (1.3, 1.5)}},
    },
}


def test_targets_are_met_or_missed() -> None:
    said = {line.what: line for line in targets_of("fp32", FOUND, "genai dense")}
    assert {what: (line.asked, line.met) for what, line in said.items()} == {
        "dense against genai dense, decode": (1.0, True),
        "slim against genai dense, decode": (1.35, False),
        "dense against genai dense, peak memory": (1.0, True),
        "slim against genai dense, peak memory": (1.0, False),
        "slim against dense, first token of 512": (1.4, True),
    }
    notes = {line.note for line in said.values() if line.note}
    assert notes == {"89% of the 1.46x bound by bytes", "quartiles 1.30 to 1.50"}
    quantized = {line.what for line in targets_of("int4", FOUND, "genai dense")}
    assert quantized == set(said) - {"slim against genai dense, decode"}


def test_a_run_is_compared_in_both_precisions_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command to its end, on a run of tiny models, with the rival's own builder; the file it
    writes holds both precisions, and the run's metrics too."""
    pytest.importorskip("onnxruntime_genai", reason="extra `peers` is not installed")
    run = tmp_path / "run"
    run.mkdir()
    config = with_values(Config(), {"bench.rounds": 1, "bench.threads": 1})
    (run / "config.toml").write_text(to_toml(config))
    model = tiny_model("llama", hidden_size=96, intermediate_size=512, max_position_embeddings=1024)
    save_narrow(model, None, run / "dense")
    tokenizer_for(run / "dense")
    file = tmp_path / "peers.json"
    command = ["bench", "--peers", GENAI, "--out", str(run), "--json", str(file)]
    early = CliRunner().invoke(app, command)
    assert "slim is not there; write it with `atp-edge shrink --out" in str(early.exception)
    cut(run / "dense", run / "slim", 0.6, "per-layer")
    monkeypatch.setattr(console, "_width", 200)  # No claim is broken over lines.
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    figures = json.loads(file.read_text())
    assert list(figures["precisions"]) == ["fp32", "int4"]
    assert json.loads((run / "metrics.json").read_text())["peers"] == figures
    for precision, found in figures["precisions"].items():
        assert set(found["rows"]) == {f"{GENAI} dense", "dense", "slim"}
        for line in found["asked"]:
            assert f"{precision}: {line['what']}" in done.output
    assert "of the decoder's parameters" in done.output


def tokenizer_for(folder: Path) -> None:
    """A tokenizer of 97 words, which genai's builder and our exporter copy."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
