"""The first layer that departs is named at half precision too: case 3c ended in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atp_export.export import export_onnx
from atp_export.verification.first_divergence import first_divergence, first_divergence_of_graphs

from atp_edge.model.checkpoint import save_narrow
from tests.tiny import tiny_model

CPU = "CPUExecutionProvider"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("flavour", ["ort", "standard", "portable"])
def test_a_layer_is_named(tmp_path: Path, flavour: str, precision: str) -> None:
    model = tiny_model("llama")
    save_narrow(model, None, tmp_path / "slim")
    for name, kind in (("onnx", precision), ("exact", "fp32")):
        export_onnx(tmp_path / "slim", tmp_path / name, flavour=flavour, precision=kind)
    ids = [*range(1, 33)]
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    save_narrow(model, None, tmp_path / "slim")
    export_onnx(tmp_path / "slim", tmp_path / "other", flavour=flavour)
    said = first_divergence(tmp_path / "onnx", model, ids, provider=CPU, bound=0.1)
    assert said.startswith("layer 1 is the first to differ, by ")
    between = first_divergence_of_graphs(
        tmp_path / "onnx", tmp_path / "other", 3, ids, provider=CPU, bound=0.1
    )
    assert between.startswith("layer 1 is the first to differ, by ")
    same = first_divergence_of_graphs(
        tmp_path / "onnx", tmp_path / "exact", 3, ids, provider=CPU, bound=0.1
    )
    assert same == "of 32 tokens read at once no part differs"
