"""Memory and disk of every part of a run, by what takes it: arithmetic from sizes, no weights read.

A part holds some things throughout, and others at one moment or another: its peak is what it holds
and the largest of its moments. What an allocator and a runtime add was measured on a CPU, and is
said where it is added; on a GPU it is not measured. A run notes what it really takes in
memory.json, part by part (`atp_edge/run/peak_memory.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from atp_edge.config import Config
from atp_edge.model.families import ModelShape
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.memory_terms import (
    activations,
    adapter,
    frozen_copies,
    generator,
    grams,
    held_weights,
    largest_tensor,
    loss_bytes,
    matched,
    mended,
    moments,
    moved_weights,
    projections,
    proof,
    widest,
)
from atp_edge.settings import with_values
from atp_edge.training.frozen import Kind, frozen_kind, pruned_kind

DeviceKind = Literal["cpu", "cuda"]
Bytes = Mapping[str, float]
CPU_RUNTIME, CUDA_RUNTIME = 0.8e9, 0.6e9
"""Of torch, transformers and the text (measured); of a CUDA context (not measured)."""
PRIMITIVES = 1024 * 0.6e6
"""What oneDNN compiles for bf16 products of new shapes, and keeps: 0.6 MB each (measured), 1,024 of
them at most (its default). A decision that moves fills it: 300 for each one of SmolLM2-135M's."""
CALIBRATION_TOKENS = 32 * 512
_ONE_BLOCK = {"train.batch_blocks": 1, "train.checkpointing": "false"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A run's model: dense and about as it will be cut, and how it lies on the disk.

    stored: bytes a weight of its checkpoint. dense_onnx, slim_onnx: bytes of the exported folders.
    """

    dense: ModelShape
    slim: ModelShape
    stored: torch.dtype
    dense_onnx: int
    slim_onnx: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a part of a run takes at its peak: on the device, in host memory, on the disk.

    On a CPU the device is the host, and `host` is empty. disk: what the part leaves or needs there.
    least: what is enough, of a part that takes less where there is less (0: it does not).
    """

    part: str
    device: Bytes
    host: Bytes = field(default_factory=dict)
    disk: Bytes = field(default_factory=dict)
    least: float = 0.0

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> float:
        return sum(self.disk.values())

    def to_dict(self) -> dict[str, Any]:
        """For machines: bytes, and of what."""
        return {"part": self.part, "device": self.device, "host": self.host, "disk": self.disk}


def needs_of(config: Config, model: Model, device: DeviceKind, ranks: int = 1) -> list[Need]:
    """Every part of a run in its order, of one of so many ranks: a step's text is shared out over
    them, and what a pass reads, and with `train.shard` the frozen weights."""
    run = _Run(_of_a_rank(config, ranks), model, ranks if config.train.shard else 1)
    found = [*run.parts(), *_after(config, model)]
    return [_on(device, need) for need in found]


def _of_a_rank(config: Config, ranks: int) -> Config:
    recovery = config.recovery
    return with_values(
        config,
        {
            "train.batch_blocks": -(-config.train.batch_blocks // ranks),
            "recovery.reconstruct_blocks": -(-recovery.reconstruct_blocks // ranks),
            "recovery.approach_blocks": -(-recovery.approach_blocks // ranks),
        },
    )


def _on(device: DeviceKind, need: Need) -> Need:
    """With what the runtime and its allocator add."""
    if device == "cpu":
        own = dict(need.device) if need.device else dict(need.host)
        taken = {"runtime": CPU_RUNTIME} | own
        if need.part in ("joint steps", "freeze", "recovery"):
            taken["products of new shapes"] = PRIMITIVES
        return replace(need, device=taken, host={})
    on_device = {"context": CUDA_RUNTIME} | dict(need.device) if need.device else {}
    host = {"runtime": CPU_RUNTIME} | dict(need.host)
    return replace(need, device=on_device, host=host)


def _peak(held: Bytes, *at: Bytes) -> Bytes:
    """What is held throughout, and at the moment that takes most beside it."""
    most = max(at, key=_total)
    found = {**held, **most}
    return {name: size for name, size in found.items() if size}


def _total(taken: Bytes) -> float:
    return sum(taken.values())


class _Run:
    """The parts of training, for one way of keeping the weights."""

    def __init__(self, config: Config, model: Model, ranks: int) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self.dense, self.slim = model.dense, model.slim
        self.kept = pruned_kind(config, model.stored)
        self.frozen = frozen_kind(config)
        self.read = 8.0 * largest_tensor(model.dense)
        """While weights are read: the largest tensor, as it lies and as it is kept."""
        self.host = {"largest tensor": self.read}

    def parts(self) -> list[Need]:
        return [self._dense(), self._before(), self._joint(), self._freeze(), self._recovery(),
                self._adapter()]  # fmt: skip

    def weights(self, shape: ModelShape, kind: Kind) -> float:
        return held_weights(shape, kind, self.ranks)

    def lora(self, shape: ModelShape, *, trained: bool) -> float:
        whole = adapter(shape, self.config.lora.rank)
        return whole if trained else whole / 4

    def logits(self, of_a_value: float) -> float:
        """Of one block, all of its positions."""
        return of_a_value * self.config.dataset.block_tokens * self.dense.vocabulary

    def teacher(self) -> float:
        """Of the steps before the freeze and after it, as a model of its own."""
        return self.weights(self.dense, self.frozen) if self.config.recovery.distill else 0.0

    def joint_teacher(self) -> float:
        """Before the freeze: on the student's weights, where LoRA alone is tuned."""
        config = self.config
        shares = not config.recovery.retrain and config.decision.space == "groups"
        if not config.recovery.distill or not shares or self.ranks > 1:
            return self.teacher()
        size = 4.0 if self.kept == torch.float32 else 2.0
        return size * moved_weights(self.dense) + self.lora(self.dense, trained=False)

    def _dense(self) -> Need:
        config, shape = self.config, self.dense
        lora = self.lora(shape, trained=True)
        whole = count_parameters(shape).whole
        steps = {"LoRA and its moments": lora,
                 "copies to compute with": frozen_copies(shape, self.frozen, config),
                 "activations": activations(config, shape, "dense"),
                 "loss": loss_bytes(config, shape, taught=False)}  # fmt: skip
        return Need(
            part="dense baseline",
            device=_peak({"weights": self.weights(shape, self.frozen)}, steps,
                         {"largest tensor": self.read}),
            host=self.host,
            disk={"dense/": self.model.stored.itemsize * whole, "checkpoint": 12 / 16 * lora},
        )  # fmt: skip

    def _before(self) -> Need:
        config, shape = self.config, self.dense
        base, copies = self.weights(shape, self.kept), frozen_copies(shape, self.kept, config)
        once = with_values(config, _ONE_BLOCK)
        beside = {"teacher": self.joint_teacher(), "LoRA": self.lora(shape, trained=False),
                  "generator": generator(config, shape) / 4}  # fmt: skip
        cast = {"copies to compute with": copies if config.recovery.retrain else 0.0}
        at = [
            {"largest tensor": self.read},
            {"copies to compute with": copies, "activations": activations(once, shape, "dense"),
             "loss": loss_bytes(once, shape, taught=False)},
        ]  # fmt: skip
        if config.recovery.reconstruct_blocks:
            pass_ = {"grams": grams(config, shape), "closed-form steps": mended(config, shape)}
            at.append(beside | cast | pass_)
        if config.recovery.approach_blocks and config.control_steps:
            # Where a step's teacher is a model of its own, it is the one to match.
            own = config.recovery.distill and self.joint_teacher() == self.teacher()
            other = 0.0 if own else self.weights(shape, self.frozen)
            match = {"grams": grams(config, shape), "teacher to match": other,
                     "closed-form steps": matched(config, shape, shape)}  # fmt: skip
            at.append(beside | cast | match)
        return Need(part="before the joint steps", device=_peak({"weights": base}, *at),
                    host=self.host)  # fmt: skip

    def _joint(self) -> Need:
        config, shape, slim = self.config, self.dense, self.slim
        taught = config.recovery.distill > 0
        lora = self.lora(shape, trained=True)
        held = {"weights": self.weights(shape, self.kept), "teacher": self.joint_teacher(),
                "grams": grams(config, shape), "LoRA and its moments": lora,
                "generator": generator(config, shape),
                "kept weights' moments": moments(config, shape)}  # fmt: skip
        # Of frozen weights what a decision keeps is gathered once, and kept as long as it stands.
        gathered = 2.0 * projections(slim)
        if self.ranks > 1 or (config.train.checkpointing == "true" and config.recovery.retrain):
            gathered = 2.0 * projections(slim) / len(slim.layers)
        lora_step = {"copies to compute with": gathered,
                     "activations": activations(config, slim, "lora"),
                     "loss": loss_bytes(config, shape, taught=taught)}  # fmt: skip
        backward = {"copies to compute with": gathered,
                    "kept weights' gradients": self._gradients(shape)}  # fmt: skip
        at = [lora_step, backward]
        if config.decision.learn:
            without_layers = with_values(config, {"recovery.distill_hidden": 0.0})
            at.append({"copies to compute with": frozen_copies(shape, self.kept, config),
                       "activations": activations(config, shape, "generator"),
                       "loss": loss_bytes(without_layers, shape, taught=taught)})  # fmt: skip
        kept = 12.0 * projections(shape) if config.recovery.retrain else 0.0
        return Need(part="joint steps", device=_peak(held, *at), host=self.host,
                    disk={"checkpoint": lora * 12 / 16 + kept})  # fmt: skip

    def _gradients(self, shape: ModelShape) -> float:
        return 4.0 * projections(shape) if self.config.recovery.retrain else 0.0

    def _freeze(self) -> Need:
        config, lora = self.config, self.lora(self.dense, trained=False)
        base, narrow = self.weights(self.dense, self.kept), self.weights(self.slim, self.kept)
        at = [
            {"dense model, taken apart": base - narrow, "logits": self.logits(8.0)},
            {"logits": self.logits(16.0)},  # Both models', and their difference.
        ]
        if config.recovery.approach_blocks and config.steps > config.control_steps:
            at.append({"teacher to match": self.weights(self.dense, self.frozen),
                       "closed-form steps": matched(config, self.slim, self.dense)})  # fmt: skip
        return Need(part="freeze", device=_peak({"narrow model": narrow, "LoRA": lora}, *at),
                    host=self.host,
                    disk={"frozen": weights_on_disk(self.slim, self.kept) + lora})  # fmt: skip

    def _recovery(self) -> Need:
        config, shape = self.config, self.slim
        lora = self.lora(shape, trained=True)
        held = {"weights": self.weights(shape, self.kept), "teacher": self.teacher(),
                "LoRA and its moments": lora,
                "kept weights' moments": moments(config, shape)}  # fmt: skip
        copies = frozen_copies(shape, self.kept, config)
        steps = {"copies to compute with": copies,
                 "activations": activations(config, shape, "dense"),
                 "loss": loss_bytes(config, shape, taught=config.recovery.distill > 0)}  # fmt: skip
        backward = {"copies to compute with": copies,
                    "kept weights' gradients": self._gradients(shape)}  # fmt: skip
        kept = 12.0 * projections(shape) if config.recovery.retrain else 0.0
        return Need(
            part="recovery",
            device=_peak(held, steps, backward),
            host={"largest tensor": 8.0 * largest_tensor(shape)},
            disk={"checkpoint": 2 * (lora * 12 / 16 + kept),
                  "tuned": weights_on_disk(shape, self.kept) + lora / 4},
        )  # fmt: skip

    def _adapter(self) -> Need:
        once = with_values(self.config, _ONE_BLOCK)
        device = {"weights": self.weights(self.dense, self.frozen),
                  "LoRA": self.lora(self.dense, trained=False),
                  "loss": loss_bytes(once, self.dense, taught=False)}  # fmt: skip
        return Need(part="adapter", device=_peak(device, {"largest tensor": self.read}),
                    host=self.host, disk={"adapter/": device["LoRA"]})  # fmt: skip


def weights_on_disk(shape: ModelShape, kind: Kind) -> float:
    """Of a checkpoint of the narrow model, which is whole whatever is shared out."""
    return held_weights(shape, kind, 1)


def _after(config: Config, model: Model) -> list[Need]:
    """shrink, export and verify: on the CPU, whatever the device."""
    dense, slim = (count_parameters(shape).whole for shape in (model.dense, model.slim))
    tensor = 8.0 * largest_tensor(model.dense)
    calibrated = config.export.quantizer in ("auto", "gptq") and config.export.precision == "int4"
    export: dict[str, float] = {"two of the largest tensor": tensor}
    disk: dict[str, float] = {"onnx/ and onnx-dense/": model.dense_onnx + model.slim_onnx}
    if calibrated:
        wide = widest(model.dense)
        layer = projections(model.dense) / len(model.dense.layers)
        export = {"gptq: a layer, its gram in fp64 three times": 4.0 * layer + 28.0 * wide**2,
                  "logits of a block": 16.0 * config.dataset.block_tokens * model.dense.vocabulary,
                  "largest tensor": tensor / 2}  # fmt: skip
        streams = 4.0 * CALIBRATION_TOKENS * model.dense.hidden * (len(model.dense.layers) + 1)
        disk["grams, for a time"] = streams + 4.0 * len(model.dense.layers) * (
            3 * model.dense.hidden**2 + wide**2
        )
    exact = 4.0 * dense
    judged = {"model, in fp32": exact, "its fp32 graph": exact, "that graph's file": exact,
              "as shipped": float(model.dense_onnx)}  # fmt: skip
    one_layer = proof(model.dense, float(model.dense_onnx), 1)
    return [
        Need(part="shrink", device={}, host={"two of the largest tensor": tensor},
             disk={"slim/": model.stored.itemsize * slim}),
        Need(part="export", device={}, host=export, disk=disk),
        Need(part="verify", device={}, host=judged, disk={"fp32 graph, for a time": exact},
             least=CPU_RUNTIME + one_layer),
    ]  # fmt: skip
