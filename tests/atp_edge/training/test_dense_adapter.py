"""adapter/ is written where the run's LoRA is worth something on the dense model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.loading import load_model
from atp_edge.model.narrow import merge, narrow_peft
from atp_edge.model.plan import Plan, all_kept, write_plan
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training import dense_adapter
from atp_edge.training.dense_adapter import save_adapter
from atp_edge.training.measure import loss_of
from atp_edge.training.narrow_state import save_narrow_peft
from atp_edge.training.setup import TrainContext
from tests.sources import save_source
from tests.tiny import Silent, per_layer_plan, with_lora


def ids(seed: int) -> Tensor:
    return torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def context(tmp_path: Path) -> TrainContext:
    """A run of a tiny source, with a decision split of random tokens and nothing trained yet."""
    source = save_source(tmp_path / "model", tied=False)
    values = {"model": str(source), "lora.rank": 4, "lora.alpha": 8.0, "train.precision": "no"}
    splits: Any = SimpleNamespace(decision=Blocks(input_ids=ids(0), labels=ids(0)))
    return TrainContext(
        config=with_values(Config(), values),
        run=RunFolder(tmp_path / "run"),
        splits=splits,
        accelerator=Accelerator(cpu=True),
        progress=Silent(),
    )


def tuned_for(context: TrainContext, plan: Plan, share: float = 1.0) -> PeftModel:
    """A LoRA that lowers the loss, merged into the dense tuned model; and `share` of it as the
    run's, in its checkpoint under a plan."""
    source = Path(context.config.model)
    lora = with_lora(load_model(source))
    step(lora, context.splits.decision)
    save_narrow(merge(lora), None, context.run.dense)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(share)
    write_plan(plan, context.run.plan)
    save_narrow_peft(narrow_peft(lora, plan), context.run, "tuned")
    return lora


def step(model: PeftModel, blocks: Blocks) -> None:
    """LoRA factors that really lower the loss of the blocks."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        model(input_ids=blocks.input_ids, labels=blocks.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shape_of(context: TrainContext) -> Any:
    return model_shape(load_model(Path(context.config.model)).config)


def test_an_adapter_that_tunes_the_dense_model_is_written_for_plain_peft(
    context: TrainContext,
) -> None:
    lora = tuned_for(context, all_kept(shape_of(context)))
    figures = save_adapter(context, all_kept(shape_of(context)))
    assert figures["written"]
    assert figures["share"] == pytest.approx(1.0, abs=1e-3)
    assert figures["blocks"] == 4
    assert figures["perplexity"] < figures["untuned_perplexity"]
    folder = context.run.adapter
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(load_model(Path(context.config.model)), folder)
    expected = get_peft_model_state_dict(lora)
    for name, value in get_peft_model_state_dict(loaded).items():
        torch.testing.assert_close(value, expected[name])
    said = loss_of(loaded, context.splits.decision, context.accelerator).perplexity
    assert said == pytest.approx(figures["perplexity"], rel=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])


def test_one_that_is_worth_little_is_not_and_says_why(context: TrainContext) -> None:
    plan = all_kept(shape_of(context))
    tuned_for(context, plan)
    save_adapter(context, plan)
    assert context.run.adapter.exists()
    tuned_for(context, plan, share=0.02)
    figures = save_adapter(context, plan)
    assert not figures["written"]
    assert 0 < figures["share"] < dense_adapter.LEAST_SHARE
    assert f"it buys {figures['share']:.0%} of what tuning that model buys" in figures["why"]
    assert context.progress.said == [f"no adapter/: {figures['why']}"]  # type: ignore[attr-defined]
    assert not context.run.adapter.exists()  # What lay there goes.


def test_a_cut_adapter_is_judged_at_the_dense_models_sizes(context: TrainContext) -> None:
    plan = per_layer_plan(load_model(Path(context.config.model)))
    tuned_for(context, plan)
    figures = save_adapter(context, plan)
    assert 0 < figures["share"] < 1
    assert figures["written"] == (figures["share"] >= dense_adapter.LEAST_SHARE)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"recovery.adapter": "ranks"}, "begun anew at the freeze"),
        ({"recovery.adapter": "dora"}, "begun anew at the freeze"),
        ({"decision.space": "head-dims"}, "another basis"),
    ],
)
def test_one_that_cannot_fit_the_dense_model_is_not_written(
    context: TrainContext, settings: dict[str, Any], why: str
) -> None:
    config = with_values(context.config, settings)
    other = TrainContext(**{**vars(context), "config": config})
    figures = save_adapter(other, all_kept(shape_of(context)))
    assert not figures["written"]
    assert why in figures["why"]
    assert not context.run.adapter.exists()
