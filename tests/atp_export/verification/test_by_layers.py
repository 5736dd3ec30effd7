"""A model proven some layers at a time, as one that memory does not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export.export import export_onnx
from atp_export.runtime import Session
from atp_export.verification.by_layers import verify_by_layers
from atp_export.verification.excerpt import excerpt_config, excerpt_graph, excerpt_model
from transformers import LlamaConfig

from atp_edge.config import Flavour
from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.narrow import narrow_model
from tests.synthetic import LLAMA_3B
from tests.tiny import per_layer_plan, tiny_model

PROMPTS = ["3 5 7 11 13", "2 4 6 8 10 12 14", "1 1 2 3 5 8 13 21"]


class Numbers:
    """A tokenizer of numbers."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(t) if t.isdigit() else 0 for t in text.split()]}


def exported(folder: Path, family: str, flavour: Flavour, precision: Any = "fp32") -> Path:
    """A slim model of per-layer widths and its ONNX."""
    dense = tiny_model(family)
    save_narrow(narrow_model(dense, per_layer_plan(dense)), None, folder / "slim")
    export_onnx(folder / "slim", folder / "onnx", flavour=flavour, precision=precision)
    return folder


def proof(folder: Path, **options: Any) -> Any:
    return verify_by_layers(
        folder / "onnx", folder / "slim", Numbers(), PROMPTS, layers=3, new_tokens=4, **options
    )


@pytest.mark.parametrize(
    ("family", "flavour", "precision", "at_once"),
    [
        ("llama", "ort", "fp32", 2),
        ("gemma2", "standard", "int8", 1),
        ("granite", "portable", "fp32", 1),
    ],
)
def test_every_layer_is_proven_in_its_turn(
    tmp_path: Path, family: str, flavour: Flavour, precision: str, at_once: int
) -> None:
    folder = exported(tmp_path, family, flavour, precision)
    report = proof(folder, at_once=at_once, precision=precision)
    assert report.passed, report.failures
    parts = {check.name.partition(":")[0] for check in report.checks}
    assert len(parts) == -(-3 // at_once)
    assert report.greedy_total == len(parts) * len(PROMPTS)


def test_a_fault_shows_in_the_layers_that_have_it(tmp_path: Path) -> None:
    folder = exported(tmp_path, "llama", "ort")
    model = load_narrow(folder / "slim")
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight.mul_(1.01)
    save_narrow(model, None, folder / "slim")
    report = proof(folder, at_once=1)
    assert not report.passed
    faulty = {says.partition(":")[0] for says in report.failures}
    assert faulty == {"layers 2 to 2"}


def test_an_excerpt_of_all_layers_is_the_model(tmp_path: Path) -> None:
    folder = exported(tmp_path, "llama", "ort")
    part = excerpt_graph(folder / "onnx", tmp_path / "part", range(3))
    whole, cut = (
        onnx.load(f / "model.onnx", load_external_data=False) for f in (folder / "onnx", part)
    )
    names, other = ([node.name for node in model.graph.node] for model in (whole, cut))
    assert names == other
    assert Session(part).vocabulary == Session(folder / "onnx").vocabulary
    ids = torch.tensor([[3, 5, 7]])
    ours, theirs = (m(ids).logits for m in (excerpt_model(folder / "slim", range(3)),
                                            load_narrow(folder / "slim")))  # fmt: skip
    np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())


def test_layers_are_found_by_their_numbers_however_they_are_written() -> None:
    """transformers writes `05` where there are more than ten."""
    widths = {f"{i:02}": {"intermediate_size": i} for i in range(12)}
    said = {"num_hidden_layers": 12, "layer_types": [*"abcdefghijkl"], "per_layer_config": widths}
    cut = excerpt_config(said, range(5, 7))
    assert cut["num_hidden_layers"] == 2
    assert cut["layer_types"] == ["f", "g"]
    assert cut["per_layer_config"] == {
        "0": {"intermediate_size": 5},
        "1": {"intermediate_size": 6},
    }


def test_memory_decides_how_many_layers_at_once() -> None:
    from atp_edge.model.families import model_shape
    from atp_edge.pipeline.memory_terms import layers_at_once, proof

    shape = model_shape(tiny_model("llama").config)
    everything = proof(shape, 1e5, 3)
    assert layers_at_once(shape, 1e5, everything) == 3
    assert layers_at_once(shape, 1e5, everything - 1) == 2
    assert layers_at_once(shape, 1e5, 0) == 1
    more = replace(shape, layers=shape.layers * 2)
    assert proof(more, 1e5, 6) > everything


def test_a_proof_of_one_layer_is_said_to_take_what_it_took() -> None:
    """Of tests/atp_edge/pipeline/test_streaming.py: three layers of a 3B in int4, 0.36 GB."""
    from atp_edge.model.families import model_shape
    from atp_edge.pipeline.memory_need import CPU_RUNTIME
    from atp_edge.pipeline.memory_terms import proof

    shape = model_shape(LlamaConfig(**LLAMA_3B | {"num_hidden_layers": 3}))
    assert CPU_RUNTIME + proof(shape, 0.36e9, 1) == pytest.approx(9.8e9, rel=0.15)
