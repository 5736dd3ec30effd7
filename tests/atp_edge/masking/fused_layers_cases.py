"""Whole decoders with fused layers, beside joined products; test_triton_blocks.py runs them.

float64 takes the torch path for what is elementwise: the same model in float64 is the oracle.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from atp_kernels import backend_name
from torch.utils._python_dispatch import TorchDispatchMode

from atp_edge.decision.budget import feasible_decisions, parse_budget
from atp_edge.decision.importance import scored
from atp_edge.masking.apply import set_decision
from atp_edge.masking.fused_layers import fuse_layers
from atp_edge.masking.joined_site import JoinedSite
from atp_edge.masking.lora import lora_layer
from atp_edge.model.families import model_shape
from tests.atp_edge.masking.triton_blocks_cases import (
    DECISION,
    all_gradients,
    decision,
    lora_model,
    near,
)

FUSED = ("atp::norm_into", "atp::rope", "atp::masked_swiglu")


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_joined_is_what_runs() -> None:
    assert backend_name() == "joined"


@pytest.mark.parametrize("family", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("kind", ["none", "fixed", "float"])
def test_loss_and_every_gradient_equal_those_of_plain_layers(family: str, kind: str) -> None:
    model, placement = lora_model(family), "base" if kind == "fixed" else "whole"
    masks: Any = None if kind == "none" else decision(kind)
    fuse_layers(model)
    with Calls() as calls:
        ours = all_gradients(model, masks or [], placement) if masks else _none(model)
    assert (calls.of["atp::norm_into"], calls.of["atp::masked_swiglu"]) == (6, 3)
    # Of q and k by themselves, where their product is not one.
    rope = {"fixed": 3}.get(kind, 6)
    assert calls.of["atp::rope"] == (0 if family == "qwen3" else rope)
    if kind == "fixed":
        assert isinstance(lora_layer(model, 0, "q_proj").site, JoinedSite)
    plain = lora_model(family).double()
    near(ours, all_gradients(plain, masks, placement) if masks else _none(plain))


def _none(model: Any) -> Any:
    from tests.atp_edge.masking.test_compact_site import gradients

    set_decision(model, None, "whole")
    return gradients(model)


def test_in_bf16_the_products_read_what_the_norms_and_swiglu_wrote() -> None:
    """x A^T is made by nobody else: the products that the fused layers save are not there."""
    model, products = lora_model("llama"), {}
    for fused in (False, True):
        if fused:
            fuse_layers(model)
        with Calls() as calls, torch.autocast(calls_device(), dtype=torch.bfloat16):
            all_gradients(model, DECISION, "whole")
        products[fused] = calls.of["aten::mm.out"]
    # Per layer: of q, k, v; of gate, up; of down. o_proj's is left.
    assert products[False] - products[True] == 9


def calls_device() -> str:
    from tests.triton_process import DEVICE

    return DEVICE


def test_importance_is_that_of_the_hooks() -> None:
    model = lora_model("llama")
    shape = model_shape(model.get_base_model().config)
    feasible = feasible_decisions(
        shape, parse_budget("params=0.5"), widths="per-layer", width_multiple=1
    )
    scores = []
    for name in ("hooks", "fused"):
        if name == "fused":
            fuse_layers(model)
        else:
            torch_path = pytest.MonkeyPatch()
            torch_path.setattr("atp_edge.masking.lora.backend_name", lambda: "torch")
        with scored(model, feasible) as seen:
            all_gradients(model, decision("float"), "whole")
        scores.append(seen)
        torch_path.undo()
    for ours, want in zip(scores[1], scores[0], strict=True):
        assert want.all()
        torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-3)
