"""GGUF files: read back tensor by tensor, and by llama.cpp itself where it is at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from atp_export.gguf import architecture, vocabulary
from atp_export.gguf.llama_cpp import Answers, ask, node_folder
from atp_export.gguf.proof import GgufProof, _greedy, prove_gguf
from atp_export.gguf.tensors import GgufPrecision, packed_q4
from atp_export.gguf.vocabulary import checked_tokenizer, other_ids_in_llama_cpp
from atp_export.gguf.write import write_gguf
from atp_export.tokenizer_files import read_tokenizer
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from atp_edge.data.domains import demo_model_folder, legal_texts
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from tests.atp_export.gguf import cut_models
from tests.atp_export.gguf.cut_models import CHECKS
from tests.tiny import PAIR_PLANS, PLANS, tiny_model
from tests.tiny_tokenizers import (
    put_around_texts,
    renamed_special,
    save_changed,
    tokenizer_of,
)


def slim(folder: Path, real_folder: Path, family: str, policy: str, **sizes: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    dense = tiny_model(family, tied=True, vocab_size=len(tokenizer), **sizes)
    save_narrow(narrow_model(dense, (PLANS | PAIR_PLANS)[policy](dense)), tokenizer, folder)
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys, tensors as fp32) of a file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("family", "policy", "architecture"),
    [
        ("llama", "uniform", "llama"),
        ("llama-biases", "per-layer", "deci"),
        ("qwen2", "uniform", "llama"),
        ("qwen2", "per-layer", "deci"),
        ("qwen3", "uniform", "qwen3"),
    ],
)
def test_sizes_and_weights_are_the_checkpoint_s(
    tmp_path: Path, real_folder: Path, family: str, policy: str, architecture: str
) -> None:
    folder = slim(tmp_path / "slim", real_folder, family, policy)
    keys, stored = read(write_gguf(folder, tmp_path / "gguf", precision="f32"))
    model = load_narrow(folder)
    shape = model_shape(model.config)
    assert keys["general.architecture"] == architecture
    for name, values in (
        ("attention.head_count", [x.heads for x in shape.layers]),
        ("attention.head_count_kv", [x.kv_heads for x in shape.layers]),
        ("feed_forward_length", [x.channels for x in shape.layers]),
    ):
        assert keys[f"{architecture}.{name}"] == (values if architecture == "deci" else values[0])
    state = model.state_dict()
    assert np.array_equal(stored["blk.1.ffn_down.weight"], _of(state, 1, "mlp.down_proj.weight"))
    q = _of(state, 0, "self_attn.q_proj.weight")
    d = shape.layers[0].head_dim
    if architecture in ("llama", "deci"):
        # llama.cpp turns rows 2i and 2i + 1 of a head together, transformers i and i + d/2.
        order = np.stack([np.arange(d // 2), np.arange(d // 2) + d // 2], 1).flatten()
        q = q.reshape(-1, d, q.shape[1])[:, order].reshape(q.shape)
    assert np.array_equal(stored["blk.0.attn_q.weight"], q)
    assert ("blk.0.attn_q_norm.weight" in stored) == (family == "qwen3")
    assert ("blk.0.attn_v.bias" in stored) == (family in ("qwen2", "llama-biases"))


def _of(state: dict[str, Any], layer: int, name: str) -> Any:
    return state[f"model.layers.{layer}.{name}"].numpy()


def test_q4_blocks_are_what_ggml_reads() -> None:
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 16, (3, 64)).astype(np.uint8)
    scales = draw.normal(size=(3, 2)).astype(np.float16).astype(np.float32)
    found = quants.dequantize(packed_q4(levels, scales), GGMLQuantizationType.Q4_0)
    np.testing.assert_allclose(found, (levels - 8.0) * np.repeat(scales, 32, axis=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "policy", "sizes", "message"),
    [
        ("qwen3", "per-layer", {}, "no norms of queries and keys; train with --widths uniform"),
        ("llama", "uniform pairs", {"head_dim": 32}, "train with --decision-space groups"),
        ("mistral", "uniform", {"sliding_window": 64}, "a sliding window of 64 tokens"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused_by_name(
    tmp_path: Path, real_folder: Path, family: str, policy: str, sizes: Any, message: str
) -> None:
    window = sizes.pop("sliding_window", None)
    folder = slim(tmp_path / "slim", real_folder, family, policy, **sizes)
    if window:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    with pytest.raises(ValueError, match=message):
        write_gguf(folder, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_tokenizer_without_a_rule_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there"):
        checked_tokenizer(tmp_path)


BYTES_ALONE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}  # fmt: skip
DIGITS = {"type": "Digits", "individual_digits": True}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0],
           "trim_offsets": True, "add_prefix_space": False}  # fmt: skip


def swapped(old: str, new: str) -> Any:
    """A vocabulary with another token in the place of one."""
    return lambda ids: {new if token == old else token: i for token, i in ids.items()}


def steps(*pre_tokenizers: Any) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre_tokenizers]}}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", {"pre_tokenizer": {"type": "Whitespace"}}, r"\(\['Whitespace'\]\) is none that"),
        ("qwen2", steps(), r"\(\[\]\) is none that"),
        ("qwen2", steps(DIGITS, BYTES_ALONE), r"\(\['Digits', 'ByteLevel'\]\) is none that"),
        ("qwen2", {"pre_tokenizer": BYTES_ALONE}, r"\(\['ByteLevel'\]\) is none that"),
        ("qwen2", {"pre_tokenizer.pretokenizers": lambda found: found[:1]}, r"\['Split'\]"),
        ("qwen2", {"pre_tokenizer.pretokenizers.1.use_regex": True}, "is none that"),
        ("qwen2", {"normalizer": {"type": "Lowercase"}}, r"its normalizer \(Lowercase\) is none"),
        ("qwen2", {"normalizer": {"type": "NFC"}, "added_tokens.0.normalized": True,
                   "added_tokens.0.content": "e\u0301"}, "is looked for in NFC"),
        ("qwen2", {"model.end_of_word_suffix": "</w>"}, r"suffix \('</w>'\) is nothing"),
        ("qwen2", {"model.dropout": 0.1}, "its dropout is 0.1"),
        ("qwen2", {"model.merges": []}, "it has no merges"),
        # GLM-4 has [gMASK] <sop>.
        ("qwen2", {"post_processor": put_around_texts(["<s>", "<|im_start|>"], [])},
         r"puts <s> <\|im_start\|> before every text.*take them out of the post_processor"),
        ("qwen2", {"post_processor": put_around_texts(["<|im_start|>"], [])},
         r"room for its bos_token \(<s>\) alone"),
        ("qwen2", {"post_processor": put_around_texts(["<s>"], ["</s>"])},
         "puts </s> after every text"),
        ("qwen2", {"post_processor.single.0": lambda _: {"Sequence": {"id": "A", "type_id": 0}}},
         "has 2 places for a text"),
        ("qwen2", {"post_processor.single": lambda found: found[:1]}, "has 0 places for a text"),
        ("qwen2", {"post_processor.special_tokens": {}}, "puts '<s>', which its special_tokens do"),
        ("qwen2", {"post_processor": ROBERTA}, "RobertaProcessing is none whose"),
        ("qwen2", {"post_processor.special_tokens.<s>.ids": [9000]}, "puts the unknown id 9000"),
        ("qwen2", {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}},
         r"pre-tokenizer .* is none"),
        ("qwen2", {"added_tokens.0.single_word": True}, "<s> stands for whole words alone"),
        ("qwen2", renamed_special("qz", "qzx") | {"added_tokens.3.normalized": True},
         "'qz' is found in 'qzx' and before it"),
        ("gemma", {"model.vocab": swapped("<|im_end|>", "qz"), "added_tokens.3.content": "qx"},
         "'q' and 'z' are pieces but make no 'qz'"),
        ("gemma", {"model.dropout": 0.1}, "its dropout is 0.1"),
        ("gemma", {"model.ignore_merges": True}, "takes a text that is a piece whole"),
        ("gemma", {"model.vocab": swapped("<0x0B>", "<>")},
         r"no piece for 1 bytes \(the first: <0x0B>\)"),
        ("gemma", {"added_tokens.5.normalized": True}, "is looked for in text whose spaces are"),
        ("llama-2", {"added_tokens.1.normalized": True}, "'</s>' is looked for in text"),
    ],
)  # fmt: skip
def test_what_a_tokenizer_does_beyond_llama_cpps_rules_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    save_changed(tmp_path, kind, {})
    checked_tokenizer(tmp_path)
    save_changed(tmp_path, kind, changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        checked_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("steps", "named"),
    [([], False), ([{"type": "NFC"}], True), ([{"type": "Sequence", "normalizers": []}], False)],
)
def test_a_normalizer_of_no_step_or_of_nfc_alone_is_taken(
    tmp_path: Path, steps: list[Any], named: bool
) -> None:
    """DeepSeek's distilled models have one of none."""
    save_changed(tmp_path, "qwen2", {"normalizer": {"type": "Sequence", "normalizers": steps}})
    said = other_ids_in_llama_cpp(checked_tokenizer(tmp_path)) or ""
    assert ("not in NFC" in said) == named


def test_added_tokens_that_overlap_are_named(tmp_path: Path) -> None:
    """OLMo 2's: no one writes two of them into each other."""
    save_changed(tmp_path, "qwen2", renamed_special("|||IP|||", "|||PHONE|||"))
    said = other_ids_in_llama_cpp(checked_tokenizer(tmp_path)) or ""
    assert "overlap (of '|||IP|||' and '|||PHONE|||', say)" in said


def test_all_that_is_other_stands_in_one_sentence(tmp_path: Path) -> None:
    changes = renamed_special("qz", "zxy") | {"normalizer": {"type": "NFC"}}
    save_changed(tmp_path, "gpt-4o", changes)
    said = other_ids_in_llama_cpp(checked_tokenizer(tmp_path)) or ""
    assert said.count("llama.cpp gives other ids") == 1
    assert [said.count(text) for text in ("NFC", "ÉCOLE", "'qz' and 'zxy'")] == [1, 1, 1]


def test_a_vocabulary_is_read_once_to_write_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 256,000 tokens takes seconds."""
    tokenizer, times = tokenizer_of("qwen2"), []
    save_narrow(tiny_model("qwen3", vocab_size=len(tokenizer)), tokenizer, tmp_path / "slim")

    def counted(folder: Path) -> dict[str, Any]:
        times.append(folder)
        return read_tokenizer(folder)

    monkeypatch.setattr(vocabulary, "read_tokenizer", counted)
    write_gguf(tmp_path / "slim", tmp_path / "gguf")
    assert times == [tmp_path / "slim"]


@pytest.mark.parametrize("kind", ["qwen2", "deepseek-v3"])
def test_what_an_expression_leaves_is_taken_out_where_nothing_is_left(
    tmp_path: Path, kind: str
) -> None:
    """cl100k's and o200k's conversions (OLMo 2, Phi-4) keep what is found; of DeepSeek's first
    expression that would be digits alone."""
    save_changed(tmp_path, kind, {"pre_tokenizer.pretokenizers.0.behavior": "Removed",
                                  "pre_tokenizer.pretokenizers.0.invert": True})  # fmt: skip
    if kind == "qwen2":
        checked_tokenizer(tmp_path)
    else:
        with pytest.raises(ValueError, match="is none that llama"):
            checked_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is on"),
        ({"add_bos_token": False}, r"add_bos_token is False, and tokenizer\.json puts one"),
        ({"add_eos_token": True}, r"add_eos_token is True, and tokenizer\.json puts none"),
    ],
)
def test_what_the_settings_do_beside_tokenizer_json_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    save_changed(tmp_path, "qwen2", {}, settings)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        checked_tokenizer(tmp_path)


def test_text_that_is_not_in_nfc_is_named(tmp_path: Path) -> None:
    """Qwen's normalizer: llama.cpp has none."""
    tokenizer_of("qwen2").save_pretrained(tmp_path)
    assert other_ids_in_llama_cpp(read_tokenizer(tmp_path)) is None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    checked_tokenizer(tmp_path)
    assert "not in NFC" in (other_ids_in_llama_cpp(read_tokenizer(tmp_path)) or "")


NODE = node_folder()
needs_llama_cpp = pytest.mark.skipif(
    NODE is None,
    reason="node-llama-cpp is not installed: `make test` installs it where npm is at hand",
)
PROMPTS = ["The licence is granted in 2024", "Free software, a café and"]


def proof_of(folder: Path, file: Path, precision: GgufPrecision, node: Path | None) -> GgufProof:
    """On real text."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    ids = tokenizer(legal_texts()[0][0])["input_ids"][:64]
    return prove_gguf(
        folder, file, precision, tokenizer, prompts=PROMPTS, blocks=torch.tensor([ids]),
        node=node, new_tokens=24,
    )  # fmt: skip


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "policy", "precision"),
    [
        ("llama-biases", "per-layer", "f32"),
        ("qwen2", "per-layer", "f32"),
        ("qwen2", "uniform", "f32"),
        ("qwen3", "uniform", "f32"),
        ("llama", "per-layer", "q8_0"),
        ("llama", "uniform", "q4_0"),
    ],
)
def test_llama_cpp_agrees_with_pytorch(
    tmp_path: Path, real_folder: Path, family: str, policy: str, precision: GgufPrecision
) -> None:
    """Fewer heads than hidden / head_dim too: in `uniform` one KV group of three is left."""
    wide = {"hidden_size": 96, "intermediate_size": 64} if precision in ("q8_0", "q4_0") else {}
    folder = slim(tmp_path / "slim", real_folder, family, policy, **wide)
    text = torch.randint(0, 1000, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = text if precision == "q4_0" else None
    file = write_gguf(folder, tmp_path / "gguf", precision=precision, calibration=calibration)
    proof = proof_of(folder, file, precision, NODE)
    assert proof.failures == []
    assert {check.name for check in proof.checks} == CHECKS
    assert proof.release
    if precision == "f32":
        assert proof.greedy_same == len(PROMPTS)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("what", "failed"),
    [("rope", "greedy"), ("heads", "greedy"), ("pre", "ids"), ("first", "ends")],
)
def test_a_wrong_file_is_noticed(
    tmp_path: Path, real_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, failed: str
) -> None:
    """Another base of RoPE, q and k in transformers' order, another pre-tokenizer, a first token
    that the tokenizer does not put."""
    folder = slim(tmp_path / "slim", real_folder, "llama", "per-layer")
    if what == "rope":
        own = GGUFWriter.add_rope_freq_base
        monkeypatch.setattr(GGUFWriter, "add_rope_freq_base", lambda w, base: own(w, base / 100))
    elif what == "heads":
        straight = replace(architecture.BY_LAYER, paired=False)
        monkeypatch.setattr(architecture, "BY_LAYER", straight)
    elif what == "first":
        monkeypatch.setattr(vocabulary, "adds_bos", lambda folder: True)
    else:
        monkeypatch.setattr(vocabulary, "_pre_tokenizer", lambda folder: "llama-bpe")
    file = write_gguf(folder, tmp_path / "gguf", precision="f32")
    proof = proof_of(folder, file, "f32", NODE)
    assert failed in {check.name for check in proof.checks if not check.passed}


@needs_llama_cpp
def test_a_text_ends_at_every_end_token_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that no one takes for end tokens by their text."""
    folder = tmp_path / "slim"
    tokenizer = cut_models.slim(folder, "llama", "uniform")
    path = folder / "generation_config.json"
    ends = [1, 300, 301]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    file = write_gguf(folder, tmp_path / "gguf", precision="f32", context=64)
    keys, _ = read(file)
    found = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert found == ends
    assert NODE is not None
    assert ask(file, NODE, ends=[*ends, 302]).ended == [True, True, True, False]
    monkeypatch.setattr(vocabulary, "kept_ends", lambda own, ends: [own])
    file = write_gguf(folder, tmp_path / "gguf", precision="f32", context=64)
    proof = prove_gguf(
        folder, file, "f32", tokenizer, prompts=["You may"], blocks=torch.zeros(1, 8).long(),
        node=NODE, new_tokens=4,
    )  # fmt: skip
    (failure,) = proof.failures
    assert failure.startswith("first or end token that is missed: '")


@pytest.mark.parametrize("broken", [0, 1])
def test_a_model_that_computes_no_numbers_is_not_proven(broken: int) -> None:
    """Nothing lies far below the best of what is not a number, whichever prompt has it."""
    said = Answers(
        release="", ids=[], tokens=[[3, 3]] * 2, nats=[], token_ms=None, ended=[], first=False
    )
    right = torch.eye(8)[torch.tensor([[3, 3, 3, 3]])]
    answers = iter([right * torch.nan if i == broken else right for i in range(2)])
    same, check = _greedy(
        lambda ids: SimpleNamespace(logits=next(answers)), [[1, 2]] * 2, said, "f32"
    )
    assert (same, check.passed) == (1, False)


def test_a_file_of_other_weights_is_noticed_without_llama_cpp(tmp_path: Path) -> None:
    folder, other = tmp_path / "slim", tmp_path / "other"
    tokenizer = cut_models.slim(folder, "llama", "per-layer")
    cut_models.slim(other, "llama", "per-layer", rms_norm_eps=1e-5)

    def proof_of(file: Path) -> GgufProof:
        return prove_gguf(
            folder, file, "f16", tokenizer, prompts=[], blocks=torch.ones(1, 8).long(), node=None
        )

    file = write_gguf(other, tmp_path / "gguf", precision="f16", context=64)
    assert proof_of(file).failures == []
    with safe_open(other / "model.safetensors", "pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    file = write_gguf(other, tmp_path / "gguf", precision="f16", context=64)
    (failure,) = proof_of(file).failures
    assert failure.startswith("tensor that is not the checkpoint's: model.layers.1.mlp.up_proj")
