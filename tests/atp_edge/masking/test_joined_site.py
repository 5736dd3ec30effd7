"""A fixed decision in joined buffers: loss and gradients of masking, and what moves with it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from atp_kernels import backend
from torch import Tensor

from atp_edge.decision.regularizer import proximal_step
from atp_edge.masking.apply import grown, set_decision
from atp_edge.masking.joined_site import JoinedSite
from atp_edge.masking.lora import lora_layer
from atp_edge.masking.slots import EMPTY, placed, quantum_of
from tests.atp_edge.masking.test_compact_site import (
    BATCH,
    DECISION,
    IDS,
    PAIR_DECISION,
    both_ways,
    gradients,
    lora_model,
    masks,
)
from tests.tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("joined_products")


def site_of(model: Any, name: str = "gate_proj", layer: int = 0) -> JoinedSite:
    site = lora_layer(model, layer, name).site
    assert isinstance(site, JoinedSite)
    return site


@pytest.mark.parametrize(
    ("family", "placement", "lora", "retrain"),
    itertools.product(FAMILIES, ["base", "whole"], ["zero", "random"], [False, True]),
)
def test_every_gradient_equals_masking(
    family: str, placement: str, lora: str, retrain: bool
) -> None:
    model = lora_model(family, lora=lora, retrain=retrain)
    both_ways(model, placement, DECISION)
    set_decision(model, DECISION, placement)  # type: ignore[arg-type]
    assert site_of(model).slots.count(EMPTY) == 0


@pytest.mark.parametrize("placement", ["base", "whole"])
def test_gradients_in_bf16_are_as_near_as_torchs(placement: Any) -> None:
    """To fp32's, over each one's size: at most a half more than the narrow path of two products."""
    exact, errors = {}, {}
    for name in ("torch", "joined"):
        model = lora_model("qwen2")
        exact = exact or _taken(model, placement, "torch", cast=False)
        found = _taken(model, placement, name, cast=True)
        errors[name] = max(
            float((found[key] - want).norm() / want.norm().clamp_min(1e-9))
            for key, want in exact.items()
        )
    assert errors["joined"] <= 1.5 * errors["torch"] < 0.1


def _taken(model: Any, placement: Any, name: str, *, cast: bool) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_KERNELS", name)
        backend.backend_name.cache_clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            set_decision(model, DECISION, placement)
            found = gradients(model)
    backend.backend_name.cache_clear()
    return found


@pytest.mark.parametrize("share", ["all", "no channel", "no head"])
def test_sites_kept_or_removed_whole(share: str) -> None:
    decision = masks((0, 1, 2), (0, 1, 2), (0, 1, 2))
    for site, mask in enumerate(decision):
        attention = site % 2 == 0
        mask[:] = not (
            (share == "no channel" and not attention) or (share == "no head" and attention)
        )
    for placement in ("base", "whole"):
        both_ways(lora_model(), placement, decision)


def test_rope_pairs_are_masked_while_channels_are_joined() -> None:
    model = lora_model("qwen2", space="head-dims")
    both_ways(model, "base", PAIR_DECISION)
    set_decision(model, PAIR_DECISION, "whole")
    assert lora_layer(model, 0, "q_proj").site is None
    site_of(model, "up_proj")


def moved(decision: Any, site: int, *structures: int) -> list[Tensor]:
    """The decision with some structures of a site on the other side."""
    other = [mask.clone() for mask in decision]
    other[site][list(structures)] = ~other[site][list(structures)]
    return other


def test_structures_that_came_alone_are_copied_and_generator_steps_take_nothing_apart() -> None:
    model = lora_model(lora="zero")
    set_decision(model, DECISION, "base")
    gradients(model)
    buffer = site_of(model)._buffers["gate_proj"]
    first, lies = buffer.copied, buffer.weights.buffer.data_ptr()  # type: ignore[union-attr]
    assert first == int(DECISION[1].sum())
    generator_step = [torch.rand(len(m)).requires_grad_() for m in DECISION]
    set_decision(model, generator_step, "whole")
    assert lora_layer(model, 0, "gate_proj").site is None
    gradients(model)
    # Channel 1 goes, channel 0 comes; nothing else of the site is copied, and nothing of others.
    other = moved(DECISION, 1, 0, 1)
    both_ways(model, "base", other)
    set_decision(model, other, "base")
    gradients(model)
    assert buffer.copied == first + 1
    assert buffer.weights.buffer.data_ptr() == lies  # type: ignore[union-attr]
    assert site_of(model, layer=1)._buffers["gate_proj"].copied == int(DECISION[3].sum())


def test_a_chain_of_decisions_ends_where_the_last_one_begins_anew() -> None:
    """Slots are where history left them; what is computed is the same."""
    chained, draw = lora_model("qwen3"), torch.Generator().manual_seed(2)
    for _ in range(6):
        decision = [torch.rand(len(m), generator=draw) < 0.6 for m in DECISION]
        for mask in decision[::2]:
            mask[1] = True
        set_decision(chained, decision, "base")
        found = gradients(chained)
    fresh = lora_model("qwen3")
    set_decision(fresh, decision, "base")
    for name, want in gradients(fresh).items():
        torch.testing.assert_close(found[name], want, atol=1e-5, rtol=1e-4, msg=name)


def test_buffers_fall_with_a_weight_and_follow_the_lora() -> None:
    model = lora_model()
    both_ways(model, "base", DECISION)
    with torch.no_grad():
        lora_layer(model, 0, "gate_proj").get_base_layer().weight *= 2
        lora_layer(model, 0, "o_proj").get_base_layer().weight += 0.1
        lora_layer(model, 1, "up_proj").lora_B["default"].weight += 0.1
    both_ways(model, "base", DECISION)


def test_lora_that_comes_to_life_is_told_of_and_computed_once_looked_at() -> None:
    model = lora_model()
    proximal_step(model, DECISION, 100.0)
    set_decision(model, DECISION, "base")
    slots = site_of(model).slots
    assert not grown(model)
    assert len(slots) == int(DECISION[1].sum())
    with torch.no_grad():
        lora_layer(model, 0, "up_proj").lora_B["default"].weight[0] += 0.1
    assert grown(model)
    set_decision(model, DECISION, "base", held=True)
    assert site_of(model).slots == slots
    set_decision(model, DECISION, "base")
    assert set(site_of(model).slots) == {*slots, 0}
    assert not grown(model)
    both_ways(model, "base", DECISION)


def test_a_buffer_written_to_before_the_backward_pass_is_an_error() -> None:
    model = lora_model()
    set_decision(model, DECISION, "base")
    loss = model(input_ids=IDS).logits.square().sum()
    set_decision(model, moved(DECISION, 3, 0, 2), "base")
    model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_does_not_spoil_training() -> None:
    model = lora_model()
    set_decision(model, DECISION, "whole")
    with torch.inference_mode():
        model(input_ids=BATCH.input_ids)
    assert gradients(model)["loss"] > 0


def test_no_decision_lets_go_of_the_buffers() -> None:
    model = lora_model()
    set_decision(model, DECISION, "whole")
    gradients(model)
    set_decision(model, None, "whole")
    assert all(lora_layer(model, 0, n).rested is None for n in ("gate_proj", "o_proj"))


def test_slots_stand_and_widths_move_by_quanta() -> None:
    assert placed([5, 1, 3], None, 2) == [1, 3, 5, EMPTY]
    assert placed([1, 3, 4, 7], [1, 3, 5, EMPTY], 2) == [1, 3, 4, 7]
    assert placed([1, 3, 4, 7, 9], [1, 3, 4, 7], 2) == [1, 3, 4, 7, 9, EMPTY]
    assert placed([3], [1, 3, 4, 7, 9, EMPTY], 2) == [EMPTY, 3, EMPTY, EMPTY, EMPTY, EMPTY]
    assert placed([3], [1, 3, 4, 7, 9, 10, 11, 12], 2) == [3, EMPTY]
    assert [quantum_of(n) for n in (40, 1536, 14336)] == [1, 24, 128]


def test_empty_slots_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atp_edge.masking.joined_site.quantum_of", lambda size: 16)
    model = lora_model("llama-biases")
    both_ways(model, "base", [m if len(m) > 3 else torch.ones_like(m) for m in DECISION])
    set_decision(model, DECISION, "whole")
    gradients(model)
    assert EMPTY in site_of(model, layer=1)._buffers["gate_proj"].held
