"""What a record says is what transformers computes; what no record says is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, LlamaConfig

from atp_edge.model.families import FAMILIES, longest_text, model_shape
from atp_edge.model.structures import sites_of
from tests.tiny import FAMILIES as FIRST
from tests.tiny import NEW_FAMILIES, tiny_model

MIXTURES = ["mixtral", "qwen3_moe", "ernie4_5_moe", "granitemoe", "olmoe"]
HYBRIDS = ["qwen3_next", "lfm2", "bamba", "falcon_h1", "granitemoehybrid", "mamba", "zamba2"]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_refused_by_name(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"model_type '{model_type}' .*: a mixture of experts"):
        model_shape(config)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_hybrid_is_refused_by_name(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"model_type '{model_type}' .*: a hybrid, some of"):
        model_shape(config)


def test_a_model_that_reads_images_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'gemma3' is not supported: it reads more than text"):
        model_shape(AutoConfig.for_model("gemma3"))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "logit_scale", 0.25),
        ("llama", "num_experts", 8),
        ("llama", "sliding_window", 64),
        ("mistral", "embedding_multiplier", 12.0),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("hunyuan", "use_qk_norm", False),
    ],
)
def test_a_key_that_would_change_the_arithmetic_is_refused(
    family: str, key: str, value: Any
) -> None:
    config = tiny_model(family).config
    setattr(config, key, value)
    with pytest.raises(ValueError, match=rf"{key} {value!r} of a \S+ model is not known here"):
        model_shape(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_interleaved", False), ("sliding_window", 4096), ("logit_scale", 1.0), ("hobby", "go")],
)
def test_a_key_that_says_nothing_is_passed_over(key: str, value: Any) -> None:
    config = LlamaConfig(num_hidden_layers=1, **{key: value})
    assert model_shape(config).layers[0].sliding_window is None


def test_a_key_that_a_record_does_not_name_must_have_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a later transformers may bring one."""
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], reads=("mlp_bias",)))
    model_shape(LlamaConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"attention_bias True .*expected False, its default"):
        model_shape(LlamaConfig(num_hidden_layers=1, attention_bias=True))


@pytest.mark.parametrize("family", [*FIRST, *NEW_FAMILIES])
def test_the_defaults_of_a_family_are_known(family: str) -> None:
    config = type(tiny_model(family).config)()
    shape = model_shape(config)
    assert len(shape.layers) == config.num_hidden_layers


def test_what_the_layers_of_gemma_3_see_and_turn_by() -> None:
    layers = model_shape(tiny_model("gemma3").config).layers
    assert [x.sliding_window for x in layers] == [5, None, 5]
    assert [x.rope for x in layers] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_layers_without_rope_are_those_that_transformers_does_not_turn() -> None:
    assert [x.rope for x in model_shape(tiny_model("smollm3").config).layers] == ["", None, ""]
    assert [x.rope for x in model_shape(tiny_model("exaone4").config).layers] == ["", None, ""]


def test_a_text_ends_where_rope_or_scores_become_others() -> None:
    assert longest_text(tiny_model("phi4-mini").config) == 192
    assert longest_text(tiny_model("ministral3").config) == 128
    assert longest_text(tiny_model("gemma3").config) == 256


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3", "norms queries and keys"),
        ("olmo2", "norms queries and keys"),
        ("ernie4_5", "turns a head by RoPE in another way"),
        ("glm4", "turns a head by RoPE in another way"),
        ("phi3", "has q, k and v in one matrix"),
    ],
)
def test_pairs_are_cut_only_where_that_is_exact(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"decision\.space = 'head-dims': \S+ {reason}"):
        sites_of(model_shape(tiny_model(family).config), "head-dims")


def test_every_family_has_a_class_in_transformers() -> None:
    for name in FAMILIES:
        made = AutoConfig.for_model(name)
        reader = type(made).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
        assert hasattr(transformers, reader), name
