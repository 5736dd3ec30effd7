"""The joint loop and recovery: what they learn, and that a killed run ends like an unbroken one."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from atp_edge.config import Config, StructureSpace
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.decision.importance import (
    starting_logits,
)
from atp_edge.losses import distilled_loss
from atp_edge.reconstruction.repair import Repair
from atp_edge.run.history import Record
from atp_edge.settings import with_values
from atp_edge.training.learners import JointLearner, Tuner
from atp_edge.training.loop import run_phase
from tests.atp_edge.decision.test_importance import importance_to
from tests.tiny import BLOCKS, SPACES, feasible_of, lora_model, tiny_model


def test_distillation_costs_least_from_oneself() -> None:
    model = tiny_model("llama")
    one, plain = distilled_loss(model, model, BLOCKS.first(2), 0.0)
    assert float(one.detach()) == pytest.approx(float(plain))
    other = tiny_model("llama", seed=5)
    far = distilled_loss(model, other, BLOCKS.first(2), 1.0)[0]
    near = distilled_loss(other, other, BLOCKS.first(2), 1.0)[0]
    assert float(far.detach()) > float(near.detach())


CONFIG = with_values(
    Config(),
    {
        "steps": 12,
        "train.save_every": 4,
        "train.precision": "no",
        "decision.control_share": 1.0,
        "decision.lr": 0.1,
        "lora.lr": 0.01,
        "decision.noise": 0.3,
    },
)


def learner(
    config: Config = CONFIG,
    widths: str = "per-layer",
    structures: StructureSpace = "groups",
    retrain: bool = False,
    teacher: PreTrainedModel | None = None,
) -> JointLearner:
    model = lora_model(structures=structures)
    torch.manual_seed(0)
    feasible = feasible_of(model, widths=widths)
    generator = DecisionGenerator(feasible.sites)
    return JointLearner(
        model, generator, feasible, BLOCKS, BLOCKS, config, Accelerator(cpu=True), retrain=retrain,
        teacher=teacher,
    )  # fmt: skip


def finish(made: Any, folder: Path, stop_at: int | None = None) -> list[Record]:
    """Run a phase; `stop_at`: killed before that step."""
    seen: list[Record] = []

    def watch(record: Record) -> None:
        seen.append(record)
        if stop_at is not None and record.step + 1 == stop_at:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run_phase(made, folder=folder, save_every=4, on_record=watch)
    return seen


def test_churn_is_of_what_was_learned_not_of_what_was_sampled() -> None:
    still = {"decision.noise": 1.0, "decision.lr": 0.0, "decision.follow": False}
    made = learner(with_values(CONFIG, still))
    held = []
    for i in range(6):
        churn = made.step(i).churn
        held.append(torch.cat(made.masks))
        assert churn in (None, 0.0)
    assert (held[0] != held[2]).float().mean() > 0.2, "the samples were alike"
    assert torch.equal(torch.cat(made.freeze()), torch.cat(learner().masks))


@pytest.mark.parametrize("structures", SPACES)
@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_the_loop_learns_and_every_decision_meets_the_budget(
    tmp_path: Path, widths: str, structures: StructureSpace
) -> None:
    config = dataclasses.replace(CONFIG, steps=40)
    made = learner(config, widths, structures)
    records = finish(made, tmp_path)
    assert all(r.kept_share is not None and r.kept_share <= 0.6 for r in records)
    assert max(r.churn or 0 for r in records) > 0
    first, last = (sum(r.loss for r in part) for part in (records[:8], records[-8:]))
    assert last < first


@pytest.mark.parametrize(("follows", "asked"), [(False, 4), (True, 4), (True, 1000)])
def test_importance_is_followed_from_decision_to_decision(follows: bool, asked: int) -> None:
    config = with_values(CONFIG, {"decision.follow": follows, "decision.importance_blocks": asked})
    made = learner(config)
    scored = BLOCKS.first(asked)
    made.importance = start = importance_to(made.model, scored)
    made.step(0)
    assert made.importance is not None
    changed = any(not torch.equal(a, b) for a, b in zip(start, made.importance, strict=True))
    assert changed == follows
    if follows:
        # The blocks of the start keep their weight beside one more.
        kept = len(scored.input_ids) / (len(scored.input_ids) + 1)
        for before, after in zip(start, made.importance, strict=True):
            assert (after >= before * kept**0.5 * 0.999).all()
        gained = [a / b for a, b in zip(made.importance, start, strict=True)]
        assert min(float(g.min()) for g in gained) < 1.01 * kept**0.5
        wanted = starting_logits(made.importance, made.feasible)
        for i, base in enumerate(wanted):
            torch.testing.assert_close(made.generator.get_buffer(f"base_{i}"), base)


def test_the_decision_learns_from_predictions_and_lora_from_layers_too() -> None:
    def after_a_step(hidden: float) -> tuple[Tensor, Tensor]:
        config = with_values(CONFIG, {"recovery.distill_hidden": hidden})
        made = learner(config, teacher=tiny_model("llama", seed=3))
        made.importance = importance_to(made.model, BLOCKS.first(4))
        made.step(0)
        return torch.cat(made.importance), torch.cat(
            [parameter.flatten() for parameter in made.tuned.parameters.values()]
        )

    importance, tuned = after_a_step(0.0)
    also, otherwise = after_a_step(8.0)
    assert torch.equal(importance, also)
    assert not torch.equal(tuned, otherwise)


def test_the_generator_warms_up_and_comes_to_rest() -> None:
    made = learner(dataclasses.replace(CONFIG, steps=200))
    rates = [made._generator_rate(index) for index in range(0, 200, 2)]
    assert rates[0] == pytest.approx(CONFIG.decision.lr / 10)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(CONFIG.decision.lr / 100)


@pytest.mark.parametrize("whole", [False, True])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, whole: bool) -> None:
    """Alone, and with all that moves along: the repair, the kept weights, the importance."""

    def made() -> JointLearner:
        one = learner(retrain=whole)
        if whole:
            one.importance = importance_to(one.model, BLOCKS.first(4))
            one.repair = Repair(one.model, one.masks, BLOCKS)
        return one

    straight = made()
    records = finish(straight, tmp_path / "straight")
    finish(made(), tmp_path / "killed", stop_at=7)
    resumed = made()
    rest = finish(resumed, tmp_path / "killed")
    assert [r.step for r in rest] == list(range(4, 12))
    for name, parameter in straight.tuned.parameters.items():
        assert torch.equal(parameter, resumed.tuned.parameters[name]), name
    for of in (lambda x: x.masks, lambda x: x.importance or []):
        for ours, theirs in zip(of(straight), of(resumed), strict=True):
            assert torch.equal(ours, theirs)
    assert [r.loss for r in rest] == [r.loss for r in records[4:]]
    histories = [(tmp_path / n / "history.jsonl").read_text() for n in ("straight", "killed")]
    assert len({h.count("\n") for h in histories}) == 1


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two = learner(), learner()
    finish(one, tmp_path / "1")
    finish(two, tmp_path / "2")
    for name, parameter in one.tuned.parameters.items():
        assert torch.equal(parameter, two.tuned.parameters[name])


def test_recovery_tunes_the_kept_weights_too_and_resumes(tmp_path: Path) -> None:
    def tuner() -> Tuner:
        model = lora_model()
        teacher = tiny_model("llama", seed=3)
        return Tuner(model, BLOCKS, CONFIG, Accelerator(cpu=True), phase="recovery",
                     first_step=2, teacher=teacher, retrain=True)  # fmt: skip

    straight, resumed = tuner(), tuner()
    start = {n: p.detach().clone() for n, p in straight.tuned.parameters.items()}
    finish(straight, tmp_path / "straight")
    finish(tuner(), tmp_path / "killed", stop_at=9)
    finish(resumed, tmp_path / "killed")
    for name, parameter in straight.tuned.parameters.items():
        assert torch.equal(parameter, resumed.tuned.parameters[name]), name
        assert not torch.equal(parameter, start[name]), name
