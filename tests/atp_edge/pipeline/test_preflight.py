"""What a later stage would refuse is refused before anything is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atp_edge.model import loading
from atp_edge.model.loading import read_tensor, tensor_files
from atp_edge.pipeline.preflight import check_precision, check_run
from atp_edge.run.folder import STAGES, RunFolder
from atp_edge.settings import configured
from tests.sources import change, edit, save_source
from tests.tiny_tokenizers import tokenizer_of

SETTINGS: dict[str, Any] = {
    "dataset.block_tokens": 32,
    "decision.width_multiple": 4,
    "bench.prompt_tokens": 8,
    "bench.new_tokens": 4,
    "budget": "params=0.7",
}


def checked(source: Path, stages: Any = STAGES, **settings: Any) -> None:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    check_run(configured(SETTINGS | {"model": str(source)} | given), stages)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0} | more}


NARROW = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            {},
            {"lora__rank": 49},
            r"lora\.rank = 49: .* its hidden size, 48; take that many or fewer",
        ),
        ({"hidden_act": "relu"}, {}, r"config\.json: hidden_act 'relu' is not supported"),
        (rope("dynamic"), {}, r"config\.json: rope_type 'dynamic' is not supported; expected def"),
        (
            rope("longrope", original_max_position_embeddings=64, **NARROW),
            {"dataset__block_tokens": 65},
            r"block_tokens = 65: the model reads 64 positions \(original_max_position_embeddings",
        ),
        (
            rope("longrope", original_max_position_embeddings=64, **NARROW),
            {"export__context": 65},
            r"context of 65 tokens: .*made for 64, and beyond them it computes attention otherwise",
        ),
        (
            rope("linear", partial_rotary_factor=0.5),
            {},
            r"RoPE turns 8 of a head's 16 dimensions \(partial_rotary_factor\)",
        ),
        ({}, {"export__context": 300}, r"context of 300 tokens: the model was made for 256"),
        ({}, {"dataset__block_tokens": 257}, "dataset.block_tokens = 257: the model reads 256"),
        (
            {},
            {"dataset__block_tokens": 128, "export__precision": "fp16", "export__context": 64},
            "dataset.block_tokens = 128: what fp16 costs is measured on whole blocks",
        ),
        (
            {},
            {"bench__prompt_tokens": 600},
            r"bench\.prompt_tokens = 600 and bench\.new_tokens = 4 need 605 positions, and the exp",
        ),
        ({}, {"bench__prompt_tokens": 61, "export__context": 64}, "context is 64; take fewer"),
        ({}, {"budget": "params=0.001"}, "the smallest budget for this model is params="),
        ({}, {"export__precision": "bf16"}, "a whole run proves what it ships"),
        ({}, {"export__quantizer": "gptq"}, "quantizer gptq rounds int8 and int4 weights, not fp"),
        (
            {},
            {"export__keep_adapter": True, "recovery__adapter": "dora"},
            "DoRA's magnitudes; take lora or ranks",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "has a quantization_config .fp8."),
        ({"num_hidden_layers": 4}, {}, r"layers\.3\.\S+: it is missing"),
    ],
    ids=str,
)
def test_models_and_settings_are_refused_at_once(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    save_source(tmp_path, config=config)
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, **settings)


@pytest.mark.parametrize("head_dim", [100, 40, 72])
def test_a_head_that_the_fused_operator_refuses_needs_the_standard_flavour(
    tmp_path: Path, head_dim: int
) -> None:
    save_source(tmp_path, head_dim=head_dim)
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is no multiple of 16.*flavour stan"):
        checked(tmp_path)
    checked(tmp_path, export__flavour="standard")


def no_eos() -> Any:
    tokenizer = tokenizer_of("byte-level", bos=False)
    tokenizer.eos_token = None
    return tokenizer


def one_token_more() -> Any:
    tokenizer = tokenizer_of("byte-level", bos=False)
    tokenizer.add_tokens(["<law>"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "sizes", "message"),
    [
        (no_eos, {"eos_token_id": 1}, "no eos_token"),
        (one_token_more, {"vocab_size": len(one_token_more()) - 1}, "'<law>' has the id"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_model_is_refused(
    tmp_path: Path, tokenizer: Callable[[], Any], sizes: dict[str, int], message: str
) -> None:
    save_source(tmp_path, tokenizer=tokenizer(), **sizes)
    with pytest.raises(ValueError, match=message):
        checked(tmp_path)


def test_a_vocabulary_padded_beyond_its_tokens_is_taken(tmp_path: Path) -> None:
    checked(save_source(tmp_path, vocab_size=1024))


def test_weights_are_looked_at(tmp_path: Path) -> None:
    change(save_source(tmp_path), lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has 48 values that are nan"):
        checked(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_every_rope_that_is_written_passes(tmp_path: Path, kind: str) -> None:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more = {"linear": {}, "yarn": {}, "llama3": bands}[kind]
    long_before = {} if kind == "linear" else {"original_max_position_embeddings": 64}
    checked(save_source(tmp_path, config=rope(kind, **more, **long_before)))


def test_scaled_positions_under_their_old_key_are_read(tmp_path: Path) -> None:
    """Case 13b. That they are kept: tests/atp_export/test_onnx.py."""
    old = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    checked(save_source(tmp_path, config=old))


def test_what_no_stage_that_runs_would_refuse_passes(tmp_path: Path) -> None:
    """bf16 in training alone, a card in another encoding, weights of half precision."""
    save_source(tmp_path, dtype=torch.bfloat16)
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\nCaf\xe9\n")
    checked(tmp_path, ("train",), export__precision="bf16")


def test_a_model_of_the_hub_is_checked_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: the folder that a download leaves, of links to blobs."""
    from huggingface_hub import constants

    source = save_source(tmp_path / "source")
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        blob = cached / "blobs" / f"{i:040}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checked(Path("someone/tiny"))
    with pytest.raises(
        ValueError,
        match=r"'someone/else': no folder of that name .* not to be had",
    ):
        checked(Path("someone/else"))
    edit(snapshot / "config.json", hidden_act="gelu")
    with pytest.raises(ValueError, match=r"models--someone--tiny.*hidden_act 'gelu'"):
        checked(Path("someone/tiny"))


def test_a_gpu_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match=r"'bf16': Tesla T4 does not compute in it; .*fp16"):
        check_precision(configured({}))
    check_precision(configured({"train.precision": "fp16"}))


@pytest.mark.parametrize(
    ("setting", "more", "message"),
    [
        ({"train.precision": "fp16"}, {}, "fp16': its gradients are scaled on a GPU alone"),
        ({"train.moments": "8bit"}, {}, "train.moments = '8bit'.*take --train-moments fp32"),
        ({"train.base_dtype": "nf4"}, {"recovery.retrain": False}, "nf4' is bitsandbytes' and"),
    ],
    ids=str,
)
def test_what_only_a_gpu_or_a_missing_package_does_is_refused_here_and_counted_elsewhere(
    setting: dict[str, Any],
    more: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a run begins: what it began with stays."""
    find = importlib.util.find_spec
    there = None if "train.base_dtype" in setting else object()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: there if name == "bitsandbytes" else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = save_source(tmp_path / "source")
    config = configured(SETTINGS | {"model": str(source)} | setting | more)
    with pytest.raises(ValueError, match=message):
        check_run(config, ("train",))
    check_run(config, ("train",), elsewhere=True)


def test_a_begun_run_does_not_read_the_model_s_tensors_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is pinned; what a header tells is still looked at."""
    read: list[str] = []

    def counted(name: str, path: Path) -> Any:
        read.append(name)
        return read_tensor(name, path)

    source = save_source(tmp_path / "source")
    monkeypatch.setattr(loading, "read_tensor", counted)
    run = RunFolder(tmp_path / "run")
    checked(source, out=str(run.path))
    assert set(read) >= set(tensor_files(source))
    run.path.mkdir()
    run.records.begin("a hash")
    read.clear()
    checked(source, out=str(run.path))
    assert read == []
    change(source, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: it is missing"):
        checked(source, out=str(run.path))


def test_thresholds_of_the_gate_are_read_before_any_work(tmp_path: Path) -> None:
    source, toml = save_source(tmp_path / "source"), tmp_path / "gate.toml"
    for text, said in (("[quality]\nlos = 3\n", "unknown setting 'quality.los'"),
                       ('[prompts]\nfiles = ["none.jsonl"]\n', "none.jsonl")):  # fmt: skip
        toml.write_text(text)
        with pytest.raises((ValueError, OSError), match=said):
            checked(source, gate__config=str(toml))


def test_what_the_gate_asks_is_no_longer_than_what_ships_reads(tmp_path: Path) -> None:
    source, toml = save_source(tmp_path / "source"), tmp_path / "gate.toml"
    rule = {"prompt": "the court " * 20, "contains": "law", "name": "court"}
    (tmp_path / "rules.jsonl").write_text(json.dumps(rule))
    own = '[prompts]\nfiles = ["rules.jsonl"]\nnew_tokens = 8\n[memorization]\nprefix_tokens = 8\n'
    toml.write_text(own + "continued_tokens = 8\n")
    checked(source, gate__config=str(toml), export__context=128)
    with pytest.raises(ValueError, match=r"^court: a prompt of \d+ tokens, .* reads 32 tokens"):
        checked(source, gate__config=str(toml), export__context=32)
    toml.write_text(own + "continued_tokens = 128\n")
    with pytest.raises(ValueError, match="continued_tokens = 128: what ships reads 128 tokens"):
        checked(source, gate__config=str(toml), export__context=128)
    toml.write_text("[memorization]\nprefix_tokens = 8\ncontinued_tokens = 8\n")
    checked(source, gate__config=str(toml), export__context=32)
    with pytest.raises(ValueError, match=r"^canaries = 2: a canary: \d+ tokens, .* reads 32; "):
        checked(source, gate__config=str(toml), export__context=32, canaries=2)


@pytest.mark.parametrize("setting", ["data", "protect"])
def test_text_that_is_not_there_is_named(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=f"^{setting} 'gone.jsonl': no such file; expected legal"):
        checked(tmp_path, **{setting: "gone.jsonl"})


def test_a_file_in_the_place_of_the_run_s_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"out = '.*notes\.jsonl' is a file; name a folder"):
        check_run(configured({"out": str(tmp_path / "notes.jsonl")}), ("train",))
    with pytest.raises(ValueError, match=r"out = .*notes\.jsonl is a file; name another place"):
        check_run(configured({"out": str(tmp_path / "notes.jsonl" / "a" / "b")}), ("train",))


def test_a_share_of_what_is_protected_is_of_something(tmp_path: Path) -> None:
    """But a run that began so goes on."""
    save_source(tmp_path / "model", tokenizer=tokenizer_of("byte-level", bos=False))
    given = {"out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"protect_share = 0: nothing of --protect is kept"):
        checked(tmp_path / "model", protect="legal", decision__protect_share=0.0, **given)
    with pytest.raises(ValueError, match=r"protect_share = 0\.3: .* nothing is protected"):
        checked(tmp_path / "model", decision__protect_share=0.3, **given)
    RunFolder(tmp_path / "run").records.begin("ab")
    checked(tmp_path / "model", decision__protect_share=0.3, **given)
