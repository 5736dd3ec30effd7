"""LoRA kept apart: one exported base answers as each of its peft adapters does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from atp_export.adapter import write_adapter
from atp_export.export import export_onnx
from atp_export.runtime import Generation, Session

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model, narrow_peft
from tests.tiny import per_layer_plan, tiny_model, with_lora

IDS = np.array([[1, 2, 3, 4, 5, 6]])


def test_one_base_serves_several_adapters(tmp_path: Path) -> None:
    plan = per_layer_plan(tiny_model("qwen2"))
    base = narrow_model(tiny_model("qwen2"), plan)
    save_narrow(base, None, tmp_path / "slim")
    adapted = {f"domain{s}": narrow_peft(with_lora(tiny_model("qwen2"), s), plan) for s in (3, 4)}
    for name, model in adapted.items():
        model.save_pretrained(tmp_path / name)
    folders = {name: tmp_path / name for name in adapted}
    export_onnx(tmp_path / "slim", tmp_path / "onnx", adapters=folders)
    models = {None: base} | adapted
    for name, model in models.items():
        file = tmp_path / "onnx" / f"{name}.onnx_adapter" if name else None
        state = Generation(Session(tmp_path / "onnx", adapter=file), 1, 8)
        with torch.no_grad():
            expected = model(torch.tensor(np.append(IDS, [[7]], 1))).logits.numpy()
        np.testing.assert_allclose(state.step(IDS), expected[:, :-1], atol=1e-4)
        np.testing.assert_allclose(state.step(np.array([[7]])), expected[:, -1:], atol=1e-4)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    save_narrow(dense, None, tmp_path / "dense")
    with_lora(dense).save_pretrained(tmp_path / "peft")
    export_onnx(tmp_path / "dense", tmp_path / "plain")
    with pytest.raises(ValueError, match="takes no adapters"):
        write_adapter(tmp_path / "peft", tmp_path / "plain", tmp_path / "a.onnx_adapter")
    narrow = narrow_model(tiny_model("llama"), per_layer_plan(tiny_model("llama")))
    save_narrow(narrow, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "onnx", adapters={})
    with pytest.raises(ValueError, match="trained on another base"):
        write_adapter(tmp_path / "peft", tmp_path / "onnx", tmp_path / "a.onnx_adapter")
    export_onnx(tmp_path / "dense", tmp_path / "taking", adapters={"legal": tmp_path / "peft"})
    with pytest.raises(ValueError, match="does not take"):
        Session(tmp_path / "plain", adapter=tmp_path / "taking" / "legal.onnx_adapter")
    with pytest.raises(ValueError, match="no such adapter"):
        Session(tmp_path / "taking", adapter=tmp_path / "none.onnx_adapter")
