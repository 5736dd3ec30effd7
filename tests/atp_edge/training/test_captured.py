"""Steps from a graph are those without: what must stand still does, and what cannot is refused.

There is no GPU here: a recorder that runs the same work again, where a graph would read and write,
stands for one.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from atp_edge.data.blocks import Blocks
from atp_edge.settings import with_values
from atp_edge.training import captured
from atp_edge.training.captured import StepGraphs, Work, step_graphs
from atp_edge.training.learners import Tuner
from tests.atp_edge.training.test_learners import CONFIG, learner
from tests.tiny import BLOCKS, lora_model, tiny_model


class Recorder:
    """As a graph: it knows tensors by where they lie. Counts captures and replays."""

    def __init__(self, parameters: list[Tensor], broken: str = "") -> None:
        self.parameters, self.broken, self.captures, self.replays = parameters, broken, 0, 0

    def __call__(self, work: Work) -> Work:
        if self.broken == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captures += 1
        work()
        static = [p.grad for p in self.parameters]

        def replay() -> None:
            self.replays += 1
            held = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            work()
            for p, into, before in zip(self.parameters, static, held, strict=True):
                if into is not None and p.grad is not None:
                    into.copy_(p.grad * (1.1 if self.broken == "replay" else 1))
                p.grad = before

        return replay


def tuner(record: bool, *, broken: str = "", blocks: Blocks = BLOCKS, micro: int = 0) -> Any:
    config = with_values(CONFIG, {"train.micro_blocks": micro, "train.batch_blocks": 4})
    model = lora_model()
    made = Tuner(model, blocks, config, Accelerator(cpu=True), phase="recovery",
                 teacher=tiny_model("llama", seed=5))  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    recorder = Recorder(parameters, broken)
    made.graphs = StepGraphs(parameters, recorder if record else None)
    return made, recorder


@pytest.mark.parametrize("micro", [0, 2])
def test_steps_by_replay_train_as_those_without(micro: int) -> None:
    (plain, _), (replayed, recorder) = tuner(False, micro=micro), tuner(True, micro=micro)
    for index in range(5):
        assert replayed.step(index).loss == pytest.approx(plain.step(index).loss, rel=1e-5)
    assert recorder.captures == 1
    assert recorder.replays == 1 + (3 if micro == 0 else 8)
    for name, value in plain.tuned.parameters.items():
        torch.testing.assert_close(replayed.tuned.parameters[name], value, atol=1e-6, rtol=1e-4)


def test_other_shapes_have_graphs_of_their_own() -> None:
    """Blocks of which less is labelled."""
    few = Blocks(input_ids=BLOCKS.input_ids, labels=BLOCKS.labels.clone())
    few.labels[::2, :5] = -100
    (plain, _), (replayed, _) = tuner(False, blocks=few), tuner(True, blocks=few)
    for index in range(6):
        assert replayed.step(index).loss == pytest.approx(plain.step(index).loss, rel=1e-5)
    assert len(replayed.graphs._seen) > 1


@pytest.mark.parametrize(
    ("broken", "reason"), [("capture", "not permitted"), ("replay", "did not give the step's")]
)
def test_what_cannot_be_captured_runs_as_ever_and_is_said_once(
    broken: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (plain, _), (refused, _) = tuner(False), tuner(True, broken=broken)
    with caplog.at_level(logging.WARNING):
        for index in range(4):
            assert refused.step(index).loss == pytest.approx(plain.step(index).loss, rel=1e-6)
    assert caplog.text.count("not captured as CUDA graphs") == 1
    assert reason in caplog.text
    assert not refused.graphs._held


def test_graphs_fall_when_the_decision_moves() -> None:
    config = with_values(CONFIG, {"decision.interval": 5, "decision.noise": 0.0})
    plain, made = learner(config), learner(config)
    parameters = list(made.tuned.parameters.values())
    recorder = Recorder(parameters)
    made.graphs = StepGraphs(parameters, recorder)
    for index in range(10):
        assert made.step(index).loss == pytest.approx(plain.step(index).loss, rel=1e-4)
    assert recorder.captures == 2
    assert recorder.replays == 2 * (1 + 3)


def test_only_one_cuda_device_captures_and_only_what_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captured, "_on_cuda", lambda: lambda work: work)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def captures(device: torch.device, stands_for: float, *, fp16: bool = False) -> bool:
        return step_graphs([], device, stands_for=stands_for, fp16=fp16)._record is not None

    assert captures(gpu, 100)
    assert captures(gpu, 4)
    assert not captures(gpu, 2)  # The default interval: a graph would serve no step.
    assert not captures(cpu, 100)
    assert not captures(gpu, 100, fp16=True)
    monkeypatch.setattr("atp_edge.run.ranks.size", lambda: 2)
    assert not captures(gpu, 100)
