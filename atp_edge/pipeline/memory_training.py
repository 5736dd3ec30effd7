"""Memory and disk of the parts of training, in their order."""

from __future__ import annotations

import torch

from atp_edge.config import Config
from atp_edge.model.families import ModelShape
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.memory_need import Model, Need, peak
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
)
from atp_edge.settings import with_values
from atp_edge.training.frozen import Kind, frozen_kind, pruned_kind

_ONE_BLOCK = {"train.batch_blocks": 1, "train.checkpointing": "false"}


def training_parts(config: Config, model: Model, ranks: int) -> list[Need]:
    """Of one of so many ranks that the frozen weights are shared out over."""
    return _Training(config, model, ranks).parts()


class _Training:
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
            device=peak({"weights": self.weights(shape, self.frozen)}, steps,
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
        return Need(part="before the joint steps", device=peak({"weights": base}, *at),
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
        return Need(part="joint steps", device=peak(held, *at), host=self.host,
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
        return Need(part="freeze", device=peak({"narrow model": narrow, "LoRA": lora}, *at),
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
            device=peak(held, steps, backward),
            host={"largest tensor": 8.0 * largest_tensor(shape)},
            disk={"checkpoint": 2 * (lora * 12 / 16 + kept),
                  "tuned": weights_on_disk(shape, self.kept) + lora / 4},
        )  # fmt: skip

    def _adapter(self) -> Need:
        once = with_values(self.config, _ONE_BLOCK)
        device = {"weights": self.weights(self.dense, self.frozen),
                  "LoRA": self.lora(self.dense, trained=False),
                  "loss": loss_bytes(once, self.dense, taught=False)}  # fmt: skip
        largest = float(self.model.stored.itemsize * largest_tensor(self.dense))
        return Need(part="adapter", device=peak(device, {"largest tensor": largest}),
                    host=self.host, disk={"adapter/": device["LoRA"]})  # fmt: skip


def weights_on_disk(shape: ModelShape, kind: Kind) -> float:
    """Of a checkpoint of the narrow model, which is whole whatever is shared out."""
    return held_weights(shape, kind, 1)
