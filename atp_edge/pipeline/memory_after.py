"""Memory and disk of what comes after training."""

from __future__ import annotations

import torch

from atp_edge.config import Config
from atp_edge.gate.measured_text import BATCH_TOKENS
from atp_edge.model.families import ModelShape
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.memory_need import CPU_RUNTIME, Model, Need
from atp_edge.pipeline.memory_terms import (
    largest_tensor,
    projections,
    proof,
    streamed_loss,
    widest,
)

CALIBRATION_TOKENS = 32 * 512
JUDGED_BYTES = 28.0
"""Of a token of the gate's batch and an entry of the vocabulary: both models' logits, as they are
made and compared (measured)."""


def parts_after(config: Config, model: Model) -> list[Need]:
    """shrink, export and verify: on the CPU, whatever the device. The gate: on the device."""
    dense, slim = (count_parameters(shape).whole for shape in (model.dense, model.slim))
    stored, largest = model.stored.itemsize, largest_tensor(model.dense)
    calibrated = config.export.quantizer in ("auto", "gptq") and config.export.precision == "int4"
    # What is written has no more bytes a weight than what is stored, but for fp32.
    written = 4.0 if config.export.precision == "fp32" else stored
    export: dict[str, float] = {"largest tensor": written * largest}
    disk: dict[str, float] = {"onnx/ and onnx-dense/": model.dense_onnx + model.slim_onnx}
    if calibrated:
        wide = widest(model.dense)
        layer = projections(model.dense) / len(model.dense.layers)
        export = {"gptq: a layer, its gram in fp64 three times": 4.0 * layer + 28.0 * wide**2,
                  "logits of a block": 16.0 * config.dataset.block_tokens * model.dense.vocabulary,
                  "largest tensor": 4.0 * largest}  # fmt: skip
        streams = 4.0 * CALIBRATION_TOKENS * model.dense.hidden * (len(model.dense.layers) + 1)
        disk["grams, for a time"] = streams + 4.0 * len(model.dense.layers) * (
            3 * model.dense.hidden**2 + wide**2
        )
    exact = 4.0 * dense
    proven = {"model, in fp32": exact, "its fp32 graph": exact, "that graph's file": exact,
              "as shipped": float(model.dense_onnx)}  # fmt: skip
    one_layer = proof(model.dense, float(model.dense_onnx), 1)
    return [
        Need(part="shrink", device={}, host=streamed_loss(config, model.slim, stored),
             disk={"slim/": model.stored.itemsize * slim}),
        Need(part="export", device={}, host=export, disk=disk),
        Need(part="verify", device={}, host=proven, disk={"fp32 graph, for a time": exact},
             least=CPU_RUNTIME + one_layer),
        gate_part(model.dense, model.stored, float(model.slim_onnx)),
    ]  # fmt: skip


def gate_part(shape: ModelShape, stored: torch.dtype, shipped: float) -> Need:
    """With the dense model in fp32; instead, where that is less, in the type of its checkpoint and
    a tensor at a time in fp32. shipped: bytes of the folder that is judged."""
    count, largest = count_parameters(shape).whole, largest_tensor(shape)
    beside = {"as shipped": shipped, "logits": JUDGED_BYTES * BATCH_TOKENS * shape.vocabulary}
    in_fp32 = {"dense model, in fp32": 4.0 * count}  # Read by the host, then moved.
    as_stored = {"dense model, as stored": float(stored.itemsize * count),
                 "largest tensor, in fp32": 4.0 * largest}  # fmt: skip
    read = {"largest tensor": float(stored.itemsize * largest)}
    instead = Need(part="gate", device=as_stored | beside, host=read, can_wait=True)
    return Need(part="gate", device=in_fp32 | beside, host=in_fp32, can_wait=True,
                instead=instead if stored.itemsize < 4 else None)  # fmt: skip
