"""Every tensor of a model's folder is accounted for, and no code of it runs unasked."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from atp_edge.model.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    read_generation,
    stored_type,
    tensor_files,
)
from tests.sources import WEIGHTS, change, edit, save_source
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tokenizer_of

ROOT = Path(__file__).parents[3]
LOADERS = [load_model, check_model]
UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], object]


def poisoned(value: float) -> Change:
    return lambda tensors: tensors[UP].view(-1)[5:6].fill_(value)


DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(UP), rf"{WEIGHTS}, {UP}: it is missing, and config.json asks"),
    "no embedding": (
        lambda t: t.pop("model.embed_tokens.weight"),
        r"model\.embed_tokens\.weight: it is missing",
    ),
    "extra": (
        lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(96)}),
        rf"{WEIGHTS}, model\.layers\.1\.self_attn\.q_proj\.bias: config\.json has no place",
    ),
    "wrong shape": (
        lambda t: t.update({UP: torch.ones(39, 48)}),
        rf"{UP}: it is \[39, 48\] there, and config\.json asks for \[40, 48\]",
    ),
    "nan": (poisoned(float("nan")), rf"{WEIGHTS}: {UP} has 1 values that are nan or infinite"),
    "infinite": (poisoned(float("-inf")), rf"{WEIGHTS}: {UP} has 1 values"),
    "8 bits": (
        lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}),
        rf"{WEIGHTS}: {UP} is stored as F8_E4M3, expected one of F64, F32",
    ),
    "packed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2).int()}),
        r"qweight is stored as I32",
    ),
    "another head": (
        lambda t: t.update({"lm_head.weight": torch.ones_like(t["model.embed_tokens.weight"])}),
        r"lm_head\.weight differs from model\.embed_tokens\.weight, and .*says that they are tied",
    ),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_tensor_that_is_not_in_order_is_named_with_its_file(
    tmp_path: Path, kind: str, load: Callable[[Path], object]
) -> None:
    changed, message = DAMAGE[kind]
    change(save_source(tmp_path), changed)
    with pytest.raises(ValueError, match=message) as refused:
        load(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (4, r"model\.layers\.3\.\S+: it is missing, and config\.json asks for it \(and 8 more\)"),
        (2, r"model\.layers\.2\.\S+: config\.json has no place for it \(and 8 more\)"),
    ],
)
def test_a_layer_too_many_or_too_few_is_refused(
    tmp_path: Path, layers: int, message: str, load: Callable[[Path], object]
) -> None:
    save_source(tmp_path, config={"num_hidden_layers": layers})
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


HARMLESS: dict[str, Change] = {
    "as it is": lambda t: None,
    "the head beside the embedding": lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    ),
    "frequencies of old checkpoints": lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    ),
    "names of the model without its head": without_prefix,
    "half precision": lambda t: t.update({n: x.bfloat16() for n, x in t.items()}),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_transformers_reads_rightly_is_taken(tmp_path: Path, kind: str) -> None:
    change(save_source(tmp_path), HARMLESS[kind])
    check_model(tmp_path)
    model = load_model(tmp_path)
    expected = tiny_model("llama", tied=True, vocab_size=model.config.vocab_size).state_dict()
    half = kind == "half precision"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16().float() if half else expected[name])
    assert stored_type(tmp_path) == (torch.bfloat16 if half else torch.float32)
    assert not model.training


def test_shards_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    save_source(tmp_path)
    whole = load_model(tmp_path)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    check_model(tmp_path / "shards")
    loaded = load_model(tmp_path / "shards")
    assert all(torch.equal(x, whole.state_dict()[n]) for n, x in loaded.state_dict().items())
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} is missing; .*index\.json lists it"):
        load_model(tmp_path / "shards")


@pytest.mark.parametrize(
    "index", ["[1]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', "{"]
)
def test_an_index_that_is_none_is_named(tmp_path: Path, index: str) -> None:
    save_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is truncated or no safetens"),
        (lambda path: path.write_bytes(b"hello"), "is truncated or no safetensors file"),
        (lambda path: path.unlink(), "is missing; a checkpoint is safetensors here"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "is missing; a checkpoint"),
    ],
)
def test_weights_that_cannot_be_read_are_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(save_source(tmp_path) / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} {message}"):
        check_model(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
        for method in ("gptq", "awq", "fp8", "never heard of")
    ]
    + [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", LOADERS)
def test_a_quantized_model_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], load: Callable[[Path], object]
) -> None:
    save_source(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"config\.json has a (\w+)_config.*unquantized"):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_with_an_adapter_is_refused(
    tmp_path: Path, load: Callable[[Path], object]
) -> None:
    save_source(tmp_path)
    adapted = get_peft_model(load_model(tmp_path), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json: .*merge it first"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; expected silu"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_key_value_heads": 4}, "6 query heads for 4 KV heads"),
        ({"num_key_value_heads": -3}, "6 query heads for -3 KV heads"),
        ({"hidden_size": "48"}, r"config\.json is not in order \(.*hidden_size"),
        ({"hidden_size": -48}, "is not in order"),
        ({"num_attention_heads": None}, "is not in order"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_decoder_of_ours_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    save_source(tmp_path, config=config)
    with pytest.raises(ValueError, match=message):
        check_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[1]", "3", '"x"', "", "\ud83d"])
def test_a_configuration_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    save_source(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_text("[1]"),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xe9"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    ],
)
def test_a_tokenizer_that_does_not_load_is_one_error(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(save_source(tmp_path))
    with pytest.raises(ValueError, match=f"the tokenizer of {re.escape(str(tmp_path))}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}', "\ud83d"]
)
def test_generation_settings_that_are_none_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        read_generation(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"eos_token_id": [2, 0]}, {"eos_token_id": None}, {"temperature": 0.9}, {}]
)
def test_generation_settings_are_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert read_generation(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_generation(tmp_path) == settings


HOSTILE = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).with_name("was_here").touch()
Path({marker!r}).touch()
class Evil(PretrainedConfig):
    model_type = "evil"
class Tokenizer: ...
"""


@pytest.mark.parametrize("answer", ["", "y\n" * 20])
@pytest.mark.parametrize("load", [load_config, load_model, check_model, load_tokenizer])
def test_code_of_a_model_folder_runs_for_those_alone_who_ask(
    tmp_path: Path,
    load: Callable[..., object],
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever answers at the terminal is not asked; a folder of a family that is known runs none
    of its code either."""
    marker = tmp_path / "ran"
    folder = save_source(tmp_path / "model")
    (folder / "evil.py").write_text(HOSTILE.format(marker=str(marker)))
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
    )
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit(folder / "config.json", auto_map=evil)
    monkeypatch.setattr("builtins.input", lambda *_: answer or "y")
    if load is load_tokenizer:
        with pytest.raises(ValueError, match=r"code of its own, which runs only with --trust-remo"):
            load(folder)
    else:
        load(folder)
        edit(folder / "config.json", model_type="evil")
        with pytest.raises(ValueError, match=r"code of its own, which runs only with --trust-remo"):
            load(folder)
    assert not marker.exists()
    if load is load_config:
        assert load_config(folder, trust_remote_code=True).model_type == "evil"
        assert marker.exists()


def test_every_call_that_could_run_foreign_code_says_that_it_does_not() -> None:
    """transformers asks at the terminal where nothing is said."""
    unsaid = []
    for package in ("atp_edge", "kernels", "export", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                of_auto = re.fullmatch(r"Auto[A-Z]\w+\.from_pretrained", ast.unparse(node.func))
                if of_auto and "trust_remote_code" not in {k.arg for k in node.keywords}:
                    unsaid.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert unsaid == []


def test_float64_weights_are_worked_on_in_fp32(tmp_path: Path) -> None:
    change(save_source(tmp_path), lambda t: t.update({n: x.double() for n, x in t.items()}))
    assert stored_type(tmp_path) == load_model(tmp_path).dtype == torch.float32


def test_a_checkpoint_of_nothing_we_know_has_no_type(tmp_path: Path) -> None:
    save_source(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds no embedding"):
        stored_type(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"]


def test_a_tokenizer_reads_texts_whole(tmp_path: Path) -> None:
    """tokenizer.json can state a length to cut and to pad to, which other stacks would obey."""
    tokenizer = tokenizer_of("byte-level")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=80)
    tokenizer.save_pretrained(tmp_path / "source")
    load_tokenizer(tmp_path / "source").save_pretrained(tmp_path / "shipped")
    for name, cut in (("source", True), ("shipped", False)):
        written = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert [bool(written[key]) for key in ("truncation", "padding")] == [cut, cut]
