"""Whole blocks: no mask is made, nothing is asked, and what is computed is the same."""

from __future__ import annotations

import pytest
import torch

from atp_edge.model.attention import whole_blocks
from tests.tiny import IDS, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_are_those_with_a_mask(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma3's window is shorter than the blocks, and eager attention adds the mask: both keep
    theirs."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    want = model(input_ids=IDS, use_cache=False).logits
    asked: list[int] = []
    name = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(name, lambda positions: asked.append(1))
    with whole_blocks(model.config, IDS.shape[1]):
        found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, want)
    assert bool(asked) == (family == "gemma3" or attention == "eager")
    assert model.config._attn_implementation == attention
