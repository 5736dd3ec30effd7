"""A whole model through a step of every phase, as training makes them: time, and peaks beside what
`--dry-run` says.

LoRA alone is tuned on a bf16 base that the teacher shares, with activation checkpointing: what is
chosen for 8B on a card of 80 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from atp_bench.acceptance.models import feasible_of, random_blocks, random_llama
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import clocked_ms, free
from atp_edge.config import Config
from atp_edge.decision.generator import DecisionGenerator
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.plan import narrow_shape, plan_of
from atp_edge.model.structures import Masks
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from atp_edge.training.adapters import with_lora
from atp_edge.training.learners import JointLearner, Tuner
from atp_edge.training.optimizer import lora_parameters
from atp_edge.training.teacher import dense_adapter_file, teacher_on

_STEPS = 3
Expected = Callable[[Config, ModelShape, ModelShape], Mapping[str, float]]
"""Settings, shapes dense and slim -> bytes on the device by part: what `--dry-run` says."""
T = TypeVar("T")


def measure(
    sizes: Sizes, keep: Callable[[dict[str, Any]], None], expected: Expected
) -> dict[str, Any]:
    """Milliseconds of a step, and peak bytes on the device, by phase."""
    phases = _Phases(sizes)
    found: dict[str, Any] = {"phases": phases.found}
    keep(found)
    dense = phases.dense()
    keep(found)
    model, masks, teacher = phases.joint(dense)
    keep(found)
    narrow = phases.freeze(model, masks)
    del model, dense
    keep(found)
    phases.recovery(narrow, teacher)
    slim = model_shape(narrow.get_base_model().config)
    said = expected(phases.config, model_shape(phases.llama), slim)
    for name, row in phases.found.items():
        row["said_bytes"] = said[name]
        if "peak_bytes" in row:
            row["said_over_measured"] = said[name] / row["peak_bytes"]
    return found


class _Phases:
    """The phases in their order, and what each took."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.found = sizes, dict[str, dict[str, Any]]()
        self.llama = sizes.config(sizes.layers)
        self.config = settings_of(sizes)
        self.accelerator = Accelerator(cpu=sizes.toy, mixed_precision="bf16")
        self.blocks = random_blocks(sizes, count=_STEPS * sizes.blocks).to("cpu")
        self.folder = tempfile.TemporaryDirectory()
        self.run = RunFolder(Path(self.folder.name))

    def dense(self) -> PreTrainedModel:
        """The baseline's steps; its LoRA becomes the teacher's."""
        base = self._noted("dense baseline", self._base)
        model = with_lora(self.config, base)
        learner = Tuner(model, self.blocks, self.config, self.accelerator, phase="dense")
        self._steps("dense baseline", learner.step)
        adapter = {name: x.detach().cpu() for name, x in lora_parameters(model).items()}
        path = dense_adapter_file(self.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(adapter, path)
        dense: PreTrainedModel = model.unload()
        return dense

    def joint(self, dense: PreTrainedModel) -> tuple[PeftModel, Masks, Any]:
        """A generator step and a step of LoRA, taught."""
        feasible = feasible_of(self.llama, self.sizes)
        adapter = dense_adapter_file(self.run)
        teacher = teacher_on(dense, adapter, self.config, self.accelerator.device)
        draw = torch.Generator().manual_seed(4)
        logits = [torch.randn(site.size, generator=draw) for site in feasible.sites]
        learner = JointLearner(
            with_lora(self.config, dense),
            DecisionGenerator(feasible.sites, logits),
            feasible,
            self.blocks,
            self.blocks,
            self.config,
            self.accelerator,
            teacher=teacher,
            importance=[x.exp() for x in logits],
        )
        self._steps("joint steps", learner.step)
        return learner.model, learner.freeze(), teacher

    def freeze(self, model: PeftModel, masks: Masks) -> PeftModel:
        """The model cut by its decision."""
        plan = plan_of(model_shape(self.llama), masks.kept(), "groups")
        narrow = self._noted("freeze", lambda: narrow_peft(model, plan, take=True))
        assert model_shape(narrow.get_base_model().config) == narrow_shape(
            model_shape(self.llama), plan
        )
        return narrow

    def recovery(self, narrow: PeftModel, teacher: Any) -> None:
        """Steps of the narrow model, taught."""
        learner = Tuner(narrow, self.blocks, self.config, self.accelerator, phase="recovery",
                        teacher=teacher)  # fmt: skip
        self._steps("recovery", learner.step)

    def _base(self) -> PreTrainedModel:
        return random_llama(self.llama, self.sizes.device, self.sizes.dtype)

    def _steps(self, name: str, step: Callable[[int], Any]) -> None:
        losses: list[float] = []

        def one(index: int) -> None:
            losses.append(step(index).loss)

        free()
        if self.sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [clocked_ms(partial(one, index)) for index in range(_STEPS)]
        self._note(name, {"step_ms": times, "losses": losses})

    def _noted(self, name: str, make: Callable[[], T]) -> T:
        if self.sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        made = make()
        self._note(name, {})
        return made

    def _note(self, name: str, row: dict[str, Any]) -> None:
        if self.sizes.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        self.found[name] = self.found.get(name, {}) | row


def settings_of(sizes: Sizes) -> Config:
    """As they are chosen above a size."""
    return with_values(
        Config(),
        {
            "steps": 10,
            "budget": f"params={sizes.kept}",
            "lora.rank": 4 if sizes.toy else 64,
            "recovery.retrain": False,
            "recovery.reconstruct_blocks": 0,
            "train.checkpointing": "true",
            "train.batch_blocks": sizes.blocks,
            "dataset.block_tokens": sizes.block_tokens,
        },
    )
