"""The learning rate's course, and moments of a byte."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.losses import language_loss
from atp_edge.settings import with_values
from atp_edge.training.optimizer import TunedWeights, rate_of_step
from tests.tiny import tiny_model, with_lora


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [rate_of_step(i, steps=100, warmup=0.1, decay=True) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def tuned(moments: str) -> tuple[TunedWeights, PeftModel]:
    """A tiny model whose kept weights are tuned beside LoRA."""
    model = with_lora(tiny_model("llama", hidden_size=96, intermediate_size=96, head_dim=16))
    config = with_values(Config(), {"train.moments": moments, "train.precision": "no"})
    return TunedWeights(model, config, Accelerator(cpu=True), retrain=True), model


def losses_of(made: TunedWeights, model: PeftModel, steps: int) -> list[float]:
    ids = torch.arange(40).view(2, 20) % 97
    found = []
    for _ in range(steps):
        loss = language_loss(model, Blocks(input_ids=ids, labels=ids))
        loss.backward()
        found.append(float(loss.detach()))
        made.step(1.0)
    return found


def test_moments_in_8_bits_take_a_byte_each_and_tune_as_well() -> None:
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes` (a CPU will do)")
    exact = losses_of(*tuned("fp32"), steps=12)
    made, model = tuned("8bit")
    rounded = losses_of(made, model, steps=12)
    assert rounded[0] == exact[0]
    assert exact[-1] < exact[0] - 0.5
    assert rounded[-1] == pytest.approx(exact[-1], abs=0.1 * (exact[0] - exact[-1]))
    state = made.optimizer.state
    for name, parameter in made.parameters.items():
        large = parameter.numel() >= 4096  # bitsandbytes keeps smaller ones in fp32.
        kind = torch.uint8 if "lora_" not in name and large else torch.float32
        assert state[parameter]["state1"].dtype == kind, name
    again, other = tuned("8bit")
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    assert losses_of(again, other, 3) == losses_of(made, model, 3)


def test_loras_moments_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes is told, where it is not installed."""
    told: dict[int, int] = {}

    class Manager:
        @staticmethod
        def get_instance() -> type[Manager]:
            return Manager

        @staticmethod
        def register_parameters(parameters: list[Tensor]) -> None:
            told.update((id(p), 8) for p in parameters)

        @staticmethod
        def override_config(parameters: list[Tensor], key: str, value: int) -> None:
            assert key == "optim_bits"
            told.update((id(p), value) for p in parameters)

    tuned("fp32")  # peft asks once a process whether bitsandbytes is there: before it seems to be.
    found = SimpleNamespace(AdamW8bit=torch.optim.AdamW, GlobalOptimManager=Manager)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=found))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", found)
    made, model = tuned("8bit")
    assert told == {id(p): 32 for n, p in model.named_parameters() if "lora_" in n}
    rates = {group["peak"]: len(group["params"]) for group in made.optimizer.param_groups}
    config = Config()
    assert rates == {config.lora.lr: 2 * 21, config.recovery.retrain_lr: 21}
