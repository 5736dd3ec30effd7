"""Memory and disk of every part of a run, by what takes it: arithmetic from sizes, no weights read.

A part holds some things throughout, and others at one moment or another: its peak is what it holds
and the largest of its moments. What an allocator and a runtime add was measured on a CPU, and is
said where it is added; on a GPU it is not measured. A run notes what it really takes in
memory.json, part by part (`atp_edge/run/peak_memory.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from atp_edge.config import Config
from atp_edge.pipeline.memory_after import parts_after
from atp_edge.pipeline.memory_need import CPU_RUNTIME, DeviceKind, Model, Need
from atp_edge.pipeline.memory_training import training_parts
from atp_edge.run.records import STAGES, StageName
from atp_edge.settings import with_values

CUDA_RUNTIME = 0.6e9
"""Of a CUDA context (not measured)."""
PRODUCT, MOST_PRODUCTS, PRODUCTS_OF_A_LAYER = 0.6e6, 1024, 10
"""What oneDNN compiles for bf16 products of new shapes, and keeps: bytes of each one, how many at
most (its default), and how many new ones a layer has after a decision moved. Measured."""
KEPT_SHARE = 0.5
"""Of activations and loss, that a step has freed and glibc holds for the next one beside what it
could not be used again for (measured)."""
_STEPS = ("dense baseline", "joint steps", "recovery")
_BEFORE_THE_DECISION_MOVES = ("dense baseline", "before the joint steps")


def needs_of(
    config: Config, model: Model, device: DeviceKind, ranks: int = 1,
    left: Collection[StageName] = STAGES,
) -> list[Need]:  # fmt: skip
    """Every part of a run in its order, of one of so many ranks: a step's text is shared out over
    them, and what a pass reads, and with `train.shard` the frozen weights. left: the stages that
    are to be done."""
    shared = ranks if config.train.shard else 1
    found = [need for need in parts_after(config, model) if need.part in left]
    if "train" in left:
        found = [*training_parts(_of_a_rank(config, ranks), model, shared), *found]
    products = _products(config, len(model.dense.layers))
    return [_on(device, need, products) for need in found]


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


def _products(config: Config, layers: int) -> float:
    """Bytes of what oneDNN has compiled when the decision is frozen."""
    if config.train.precision == "no":
        return 0.0
    decisions = config.control_steps // config.decision.interval + 2  # The first, and the frozen.
    return PRODUCT * min(MOST_PRODUCTS, PRODUCTS_OF_A_LAYER * layers * decisions)


def _on(device: DeviceKind, need: Need, products: float) -> Need:
    """With what the runtime and its allocator add."""
    if need.instead is not None:
        need = replace(need, instead=_on(device, need.instead, products))
    if device == "cpu":
        own = dict(need.device) if need.device else dict(need.host)
        taken = {"runtime": CPU_RUNTIME} | own
        if need.part in _STEPS:
            of_a_step = own.get("activations", 0.0) + own.get("loss", 0.0)
            taken["freed, kept for the next step"] = KEPT_SHARE * of_a_step
        if products and need.part not in _BEFORE_THE_DECISION_MOVES:
            taken["products of new shapes"] = products
        return replace(need, device=taken, host={})
    on_device = {"context": CUDA_RUNTIME} | dict(need.device) if need.device else {}
    host = {"runtime": CPU_RUNTIME} | dict(need.host)
    return replace(need, device=on_device, host=host)
