"""A step waits for the device once, for the loss that is printed; when the decision moves, as often
as is written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from atp_edge.masking.apply import slots_of
from atp_edge.masking.joined_site import JoinedSite
from atp_edge.masking.lora import lora_layer
from atp_edge.settings import with_values
from atp_edge.training.learners import JointLearner, Tuner
from atp_edge.training.setup import with_attention
from tests.atp_edge.training.test_learners import CONFIG, finish, learner
from tests.pretended_device import Device
from tests.tiny import BLOCKS, lora_model, tiny_model

QUIET = with_values(CONFIG, {"decision.noise": 0.0, "decision.lr": 0.01, "lora.lr": 1e-3})


pytestmark = pytest.mark.usefixtures("joined_products")


def device_of(made: Tuner | JointLearner, *models: Any) -> Device:
    """With all that a learner holds on it."""
    device = Device()
    for model in (made.model, *models):
        device.put([*model.parameters(), *model.buffers()])
        with_attention(getattr(model, "get_base_model", lambda m=model: m)(), torch.device("cpu"))
    if isinstance(made, JointLearner):
        device.put([*made.generator.parameters(), *made.generator.buffers(), *made.masks])
    return device


@pytest.mark.parametrize("taught", [False, True], ids=["dense", "recovery, with a teacher"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_step_without_a_decision_reads_its_loss(taught: bool, checkpointing: str) -> None:
    teacher = tiny_model("llama", seed=5) if taught else None
    config = with_values(QUIET, {"train.checkpointing": checkpointing, "train.micro_blocks": 2})
    made = Tuner(
        lora_model(), BLOCKS, config, Accelerator(cpu=True),
        phase="recovery" if taught else "dense", teacher=teacher,
    )  # fmt: skip
    device = device_of(made, *([teacher] if teacher else []))
    made.step(0)
    with device.watched() as reads:
        made.step(1)
    assert reads == ["_local_scalar_dense"]


@pytest.mark.parametrize("retrain", [False, True])
def test_a_step_under_a_decision_reads_its_loss_and_one_that_moves_it_five_times(
    retrain: bool,
) -> None:
    teacher = tiny_model("llama", seed=5)
    made = learner(QUIET, teacher=teacher, retrain=retrain)
    made.importance = [torch.rand(site.size) for site in made.feasible.sites]
    device = device_of(made, teacher)
    counts = []
    for index in range(4):
        with device.watched() as reads:
            made.step(index)
        counts.append(list(reads))
    assert isinstance(lora_layer(made.model, 0, "up_proj").site, JoinedSite)
    # The logits for the projection, which is the host's; importance; the generator's figures; which
    # structures are live; the step's figures.
    assert counts[0] == counts[2] == ["cpu", "cpu", "tolist", "cpu", "tolist"]
    assert counts[1] == counts[3] == ["tolist"]


def test_a_killed_joint_phase_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    """To the bit: what lies where in the buffers is history, and in the checkpoint."""
    config = with_values(CONFIG, {"decision.noise": 0.0, "steps": 16})
    unbroken, killed, resumed = (learner(config) for _ in range(3))
    finish(unbroken, tmp_path / "unbroken")
    finish(killed, tmp_path / "killed", stop_at=7)
    finish(resumed, tmp_path / "killed")
    assert slots_of(unbroken.model) == slots_of(resumed.model)
    assert any(slots != sorted(slots) for slots in slots_of(unbroken.model))
    for name, value in unbroken.tuned.parameters.items():
        assert torch.equal(resumed.tuned.parameters[name], value), name


def test_the_count_sees_what_waits() -> None:
    device, there = Device(), torch.tensor([1.0, 0.0])
    device.put([there])
    mask = there > 0
    device.put([mask])
    for read, name in (
        (lambda: float(there.sum()), "_local_scalar_dense"),
        (lambda: there.tolist(), "tolist"),
        (lambda: there.mul(2).cpu(), "cpu"),
        (lambda: mask.nonzero(), "nonzero"),
        (lambda: there[mask], "index"),
        (lambda: torch.ones(2).to("cpu").sum().item(), "_local_scalar_dense"),
    ):
        with device.watched() as reads:
            read()
        assert reads == [name]
    with device.watched() as reads:
        float(torch.ones(2).sum())
    assert not reads
