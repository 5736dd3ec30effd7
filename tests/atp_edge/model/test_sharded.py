"""Frozen weights shared out by FSDP2, in a group of one: what is gathered, let go, and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as group
from torch.distributed.tensor import DTensor

from atp_edge.losses import language_loss
from atp_edge.masking.apply import set_decision
from atp_edge.model import sharded
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.sharded import is_sharded, whole, writes_stay
from atp_edge.reconstruction.teacher_match import match_teacher
from atp_edge.training.checkpointing import checkpointed, enable_checkpointing
from atp_edge.training.frozen import in_fp32, load_frozen
from tests.tiny import BLOCKS, IDS, masks_of, per_layer_plan, tiny_model, with_lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    group.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    sharded._mesh.cache_clear()
    group.destroy_process_group()


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, Any]:
    """The same model with LoRA, as it is and shared out."""
    save_narrow(tiny_model("llama", tied=True), None, tmp_path / "dense")
    plain, shared = (
        with_lora(load_frozen(tmp_path / "dense", torch.bfloat16, CPU, shared=shared))
        for shared in (False, True)
    )
    assert is_sharded(shared)
    assert not is_sharded(plain)
    return plain, shared


def gradients(model: Any, placement: Any) -> dict[str, torch.Tensor]:
    enable_checkpointing(model)
    set_decision(model, masks_of(per_layer_plan(model.get_base_model())), placement)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), checkpointed(model):
        loss = language_loss(model, BLOCKS.first(2))
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("placement", ["base", "whole"])
def test_steps_are_the_same_and_nothing_gathered_is_kept(both: Any, placement: Any) -> None:
    plain, shared = (gradients(model, placement) for model in both)
    assert plain.keys() == shared.keys()
    assert all(torch.equal(plain[name], shared[name]) for name in plain)
    for layer in both[1].get_base_model().model.layers:
        for name, parameter in layer.named_parameters():
            there = "base_layer.weight" in name
            assert isinstance(parameter, DTensor) == there, name
        for module in layer.modules():
            gathered = getattr(getattr(module, "site", None), "_gathered", None)
            assert not (gathered and gathered._made)


def test_the_match_to_the_teacher_stays(both: Any) -> None:
    plain, shared = both
    before = whole(shared.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
                   .base_layer.weight).clone()  # fmt: skip
    taught = tiny_model("llama", tied=True).bfloat16().float()
    for p in taught.parameters():
        p.data.mul_(1.1)
    for model in both:
        set_decision(model, masks_of(per_layer_plan(model.get_base_model())), "whole", skip=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            match_teacher(model, taught, BLOCKS.first(4))
    moved = dict(plain.named_parameters())
    for name, parameter in shared.named_parameters():
        assert torch.equal(whole(parameter.detach()), moved[name].detach()), name
    after = moved["base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"]
    assert not torch.equal(before, after.detach())


def test_a_shared_model_is_cut_to_a_shared_one(both: Any) -> None:
    plan = per_layer_plan(both[0].get_base_model())
    plain, shared = (narrow_peft(model, plan, take=True) for model in both)
    assert is_sharded(shared)
    with torch.no_grad(), in_fp32(plain), in_fp32(shared):
        assert torch.equal(plain(IDS).logits, shared(IDS).logits)


def test_what_is_written_without_saying_so_is_lost(both: Any) -> None:
    """Why `writes_stay` is there."""
    layer = both[1].get_base_model().model.layers[0]
    down = layer.mlp.down_proj.get_base_layer()
    before = whole(down.weight.detach()).clone()
    with torch.no_grad():
        layer.unshard()
        down.weight.add_(1.0)
        layer.reshard()
        assert torch.equal(whole(down.weight.detach()), before)
        with writes_stay(layer, [down]):
            down.weight.add_(1.0)
    assert torch.equal(whole(down.weight.detach()), before + 1.0)
