"""The teacher on the student's own weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp_edge.config import Config
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import READER_OF
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training import teacher
from atp_edge.training.adapters import with_lora
from atp_edge.training.frozen import load_frozen
from atp_edge.training.optimizer import lora_parameters
from atp_edge.training.teacher import dense_adapter_file, teacher_beside
from tests.tiny import tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


def said(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.fixture
def context(tmp_path: Path) -> Any:
    """A run whose dense baseline is tuned: its LoRA lies in its file."""
    save_narrow(tiny_model("llama", tied=True).to(torch.bfloat16), None, tmp_path / "dense")
    config = with_values(Config(), {"recovery.retrain": False, "lora.rank": 4, "lora.alpha": 8.0})
    run = RunFolder(tmp_path)
    tuned = with_lora(config, load_frozen(run.dense, torch.bfloat16, CPU))
    draw = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(tuned).values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    dense_adapter_file(run).parent.mkdir()
    save_file(lora_parameters(tuned), dense_adapter_file(run))
    return SimpleNamespace(config=config, run=run, accelerator=SimpleNamespace(device=CPU))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, "nf4"])
def test_it_says_what_the_tuned_model_says_on_the_students_weights(context: Any, kind: Any) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
    dense = load_frozen(context.run.dense, kind, CPU)
    taught = teacher_beside(dense, context)
    assert taught is not None
    before = said(taught)
    tuned = with_lora(context.config, load_frozen(context.run.dense, kind, CPU))
    held = load_file(dense_adapter_file(context.run))
    for name, parameter in lora_parameters(tuned).items():
        parameter.data = held[name]
    torch.testing.assert_close(before, said(tuned), atol=0.02, rtol=0.02)
    assert not any(p.requires_grad for p in taught.parameters())
    theirs = {p.data_ptr() for p in taught.parameters()}
    for name, parameter in dense.named_parameters():
        moved = any(part in READER_OF.values() for part in name.split("."))
        assert (parameter.data_ptr() in theirs) != moved, name
    # The student's closed-form steps move its own weights alone.
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if any(part in READER_OF.values() for part in name.split(".")):
                parameter.add_(1.0)
    assert torch.equal(said(taught), before)


def test_where_kept_weights_are_tuned_it_is_a_model_of_its_own(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = load_frozen(context.run.dense, torch.bfloat16, CPU)
    own = object()
    monkeypatch.setattr(teacher, "dense_tuned", lambda _: own)
    for settings in ({"recovery.retrain": True}, {"decision.space": "head-dims"}):
        context.config = with_values(context.config, settings)
        assert teacher_beside(dense, context) is own
    context.config = with_values(context.config, {"recovery.distill": 0.0})
    assert teacher_beside(dense, context) is None
