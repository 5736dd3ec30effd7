"""The closed-form step to the teacher's layers."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from atp_edge.config import StructureSpace
from atp_edge.masking.apply import set_decision
from atp_edge.masking.lora import add_lora, lora_layer
from atp_edge.model.checkpoint import streamed_narrow
from atp_edge.model.families import READER_OF, model_shape
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.plan import plan_of
from atp_edge.reconstruction import teacher_match
from atp_edge.reconstruction.teacher_match import match_teacher
from tests.tiny import (
    BLOCKS,
    NEW_FAMILIES,
    SPACES,
    feasible_of,
    lora_model,
    random_masks,
    tiny_model,
)
from tests.tiny import FAMILIES as FIRST


def distance(model: PeftModel, teacher: PeftModel) -> float:
    """Mean squared distance of all layers' outputs, token by token over the teacher's size."""
    layers = []
    for one in (model, teacher):
        with torch.no_grad():
            out = one(input_ids=BLOCKS.input_ids, output_hidden_states=True)
        layers.append(torch.stack(out.hidden_states[1:]))
    ours, theirs = layers
    return float(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())


def read_weights(model: PeftModel) -> list[Tensor]:
    layers = range(len(model_shape(model.get_base_model().config).layers))
    names = [(i, name) for i in layers for name in READER_OF.values()]
    return [lora_layer(model, i, n).get_base_layer().weight.detach().clone() for i, n in names]


@pytest.mark.parametrize("family", [*FIRST, *NEW_FAMILIES])
def test_a_cut_model_comes_nearer_to_its_teacher(family: str) -> None:
    model, teacher = lora_model(family), tiny_model(family, seed=1)
    set_decision(model, random_masks(feasible_of(model), seed=2), "whole", skip=False)
    before = distance(model, teacher)
    match_teacher(model, teacher, BLOCKS)
    assert distance(model, teacher) < 0.9 * before


@pytest.mark.parametrize("structures", SPACES)
def test_what_a_decision_removes_stays_as_it_is(structures: StructureSpace) -> None:
    model = lora_model(structures=structures)
    set_decision(model, random_masks(feasible_of(model), seed=2), "whole", skip=False)
    before = read_weights(model)
    match_teacher(model, tiny_model("llama", seed=1), BLOCKS)
    after = read_weights(model)
    removed = lora_layer(model, 0, "down_proj").in_mask == 0  # type: ignore[operator]
    assert torch.equal(after[1][:, removed], before[1][:, removed])
    assert not torch.allclose(after[1][:, ~removed], before[1][:, ~removed], atol=1e-3)


def test_a_model_that_is_its_teacher_stays_where_it_is() -> None:
    model = lora_model()
    teacher = copy.deepcopy(model).get_base_model()
    before = read_weights(model)
    match_teacher(model, teacher, BLOCKS)
    for ours, theirs in zip(read_weights(model), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_masked_and_narrow_models_make_the_same_step() -> None:
    masked, teacher = lora_model(), tiny_model("llama", seed=1)
    masks = random_masks(feasible_of(masked), seed=2)
    plan = plan_of(
        model_shape(masked.get_base_model().config),
        [tuple(mask.nonzero().squeeze(1).tolist()) for mask in masks],
    )
    narrow = narrow_peft(masked, plan)
    match_teacher(narrow, teacher, BLOCKS)
    set_decision(masked, masks, "whole", skip=False)
    match_teacher(masked, teacher, BLOCKS)
    ids = BLOCKS.input_ids[:4]
    torch.testing.assert_close(
        narrow(input_ids=ids).logits, masked(input_ids=ids).logits, atol=1e-3, rtol=1e-3
    )


def test_of_a_model_no_more_than_one_layers_stream_is_held() -> None:
    model = add_lora(tiny_model("llama", num_hidden_layers=5), rank=4, alpha=8.0, seed=0)
    teacher = tiny_model("llama", seed=1, num_hidden_layers=5)
    streams: list[Any] = []
    held: list[int] = []

    def count(module: Any, inputs: Any) -> None:
        held.append(sum(stream() is not None for stream in streams))
        streams.append(weakref.ref(inputs[0]))

    for layer in teacher.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(count)
    match_teacher(model, teacher, BLOCKS)
    assert held == [0, 1, 1, 1, 1]


def test_a_teacher_read_layer_by_layer_teaches_the_same(tmp_path: Path) -> None:
    """Of one whose weights come and go, `device` is none to send text to."""
    teacher = tiny_model("llama", seed=1)
    teacher.save_pretrained(tmp_path)
    moved = []
    for taught_by in (teacher, streamed_narrow(tmp_path, torch.device("cpu"))):
        model = lora_model()
        set_decision(model, random_masks(feasible_of(model), seed=2), "whole", skip=False)
        match_teacher(model, taught_by, BLOCKS)
        moved.append(read_weights(model))
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_text_read_in_parts_moves_the_weights_as_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = []
    for tokens in (teacher_match._TOKENS_AT_ONCE, 1):  # 1: a block at a time
        monkeypatch.setattr(teacher_match, "_TOKENS_AT_ONCE", tokens)
        model, teacher = lora_model(), tiny_model("llama", seed=1)
        before = lora_layer(model, 0, "down_proj").get_base_layer().weight.clone()
        match_teacher(model, teacher, BLOCKS)
        weight = lora_layer(model, 0, "down_proj").get_base_layer().weight
        assert not torch.equal(weight, before)
        moved.append(weight.detach())
    assert len(BLOCKS.input_ids) > 1
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)
