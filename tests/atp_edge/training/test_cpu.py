"""The attention to train with on a CPU, in transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atp_edge.model.narrow import narrow_model
from atp_edge.training.cpu import (
    CAUSAL,
    attention_implementation,
)
from tests.tiny import FAMILIES, tiny_model, to_cut

IDS = torch.arange(2 * 150).view(2, 150) % 97
PADDED = torch.ones_like(IDS)
PADDED[1, :40] = 0


def by(implementation: str, family: str, **given: Any) -> tuple[Tensor, Tensor]:
    """Logits of every token that is one, and the gradient to the embeddings."""
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    real = given.get("attention_mask", torch.ones_like(IDS)).bool()
    logits = model(input_ids=IDS, use_cache=False, **given).logits[real]
    logits.square().mean().backward()
    return logits.detach(), model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("given", [{}, {"attention_mask": PADDED}], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_what_eager_attention_gives(family: str, given: dict[str, Tensor]) -> None:
    ours = by(attention_implementation("cpu"), family, **given)
    torch.testing.assert_close(ours, by("eager", family, **given), atol=1e-5, rtol=1e-4)


def test_a_window_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    config_class, _ = FAMILIES["mistral"]
    monkeypatch.setitem(FAMILIES, "mistral", (config_class, {"sliding_window": 32}))
    ours = by(attention_implementation("cpu"), "mistral")
    torch.testing.assert_close(ours, by("eager", "mistral"), atol=1e-5, rtol=1e-4)


def test_generation_from_a_cache_gives_the_same_tokens() -> None:
    model = tiny_model("llama")
    texts = []
    for implementation in (attention_implementation("cpu"), "eager"):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(IDS[:1, :20], max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


@pytest.mark.parametrize("policy", ["per-layer", "per-layer pairs"])
def test_every_layer_of_a_narrow_model_has_it(policy: str) -> None:
    model = narrow_model(*to_cut("llama", policy))

    def used() -> set[str]:
        return {layer.self_attn.config._attn_implementation for layer in model.model.layers}

    model.set_attn_implementation(attention_implementation("cpu"))
    assert used() == {CAUSAL}
    found = model(IDS).logits
    model.set_attn_implementation("eager")
    assert used() == {"eager"}
    torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-4)
    made = type(model)._from_config(model.config, attn_implementation="eager")
    assert made.model.layers[0].self_attn.config._attn_implementation == "eager"
