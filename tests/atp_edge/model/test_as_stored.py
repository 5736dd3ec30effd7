"""A checkpoint held in its own type says to the bit what the same one in fp32 does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atp_edge.evaluation.scoring import TorchModel
from atp_edge.model.checkpoint import load_as_stored, load_narrow, save_narrow
from tests.tiny import TRAIN_IDS, tiny_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_it_says_the_same_from_half_the_bytes(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    save_narrow(tiny_model(family, tied=tied).to(dtype), None, tmp_path / "model")
    whole, held = load_narrow(tmp_path / "model"), load_as_stored(tmp_path / "model", "cpu")
    ours, theirs = TorchModel(held), TorchModel(whole)
    ids = TRAIN_IDS[:2] % 64
    for _ in range(2):
        found = ours.logits(ids, torch.ones_like(ids), last=4)
        assert torch.equal(found, theirs.logits(ids, torch.ones_like(ids), last=4))
    made = ours.generate(PROMPTS, new_tokens=8, end=0)
    assert made == theirs.generate(PROMPTS, new_tokens=8, end=0)
    rows = (model.logits_after([1, 2], PROMPTS) for model in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert {parameter.dtype for parameter in held.parameters()} == {dtype}
    bytes_of = [sum(p.nbytes for p in model.parameters()) for model in (held, whole)]
    assert 2 * bytes_of[0] == bytes_of[1]
    if tied:
        assert held.lm_head.weight is held.model.embed_tokens.weight
