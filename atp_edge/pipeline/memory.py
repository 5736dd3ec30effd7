"""Memory and disk of every part of a run, by what takes it: arithmetic from sizes, no weights read.

Bytes a token and layer that a backward pass needs were counted by torch's saved-tensor hooks under
bf16 autocast (tests/atp_edge/pipeline/test_memory.py counts them again). What an allocator and a
runtime add was measured on a CPU, and is said where it is added; on a GPU it is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from atp_edge.config import Config
from atp_edge.losses import CHUNK_TOKENS
from atp_edge.model.families import READER_OF, ModelShape
from atp_edge.model.structures import count_parameters
from atp_edge.training.frozen import Kind, frozen_kind, pruned_kind

DeviceKind = Literal["cpu", "cuda"]
Bytes = Mapping[str, float]
CPU_RUNTIME, CUDA_RUNTIME = 0.8e9, 0.6e9
"""Of torch, transformers and the text (measured); of a CUDA context (not measured)."""
CALIBRATION_TOKENS = 32 * 512
NF4_BYTES = 0.516
"""4 bits, and an 8-bit scale a block of 64 with its own fp32 one a block of 256."""
VERIFY_TOKENS = 1024


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
    """

    part: str
    device: Bytes
    host: Bytes = field(default_factory=dict)
    disk: Bytes = field(default_factory=dict)

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def disk_bytes(self) -> float:
        return sum(self.disk.values())


def needs_of(config: Config, model: Model, device: DeviceKind) -> list[Need]:
    """Every part of a run in its order."""
    base = pruned_kind(config, model.stored)
    found = [
        _dense(config, model),
        *_joint(config, model, base),
        _recovery(config, model, base),
        *_after(config, model),
    ]
    return [_on(device, need) for need in found]


def _on(device: DeviceKind, need: Need) -> Need:
    """With what the runtime and its allocator add."""
    if device == "cpu":
        taken = {"runtime": CPU_RUNTIME} | dict(need.device) | dict(need.host)
        return Need(part=need.part, device=taken, disk=need.disk)
    on_device = {"context": CUDA_RUNTIME} | dict(need.device) if need.device else {}
    host = {"runtime": CPU_RUNTIME} | dict(need.host)
    return Need(part=need.part, device=on_device, host=host, disk=need.disk)


def projections(shape: ModelShape) -> int:
    """Weights of all projections."""
    return count_parameters(shape).decoder


def largest_tensor(shape: ModelShape) -> int:
    """Values of the largest matrix: the vocabulary's, or an MLP's."""
    return shape.hidden * max(shape.vocabulary, *(layer.channels for layer in shape.layers))


def weights(shape: ModelShape, base: Kind) -> float:
    """Bytes of a model whose projections are kept as `base`, all else in fp32."""
    count = count_parameters(shape)
    around = 4.0 * count.around
    if base != torch.float32 and not shape.tied:
        around -= 2.0 * shape.vocabulary * shape.hidden  # The head goes with the projections.
    if base == "nf4":
        moved = moved_weights(shape)
        return (count.decoder - moved) * NF4_BYTES + 2.0 * moved + around
    return count.decoder * (4.0 if base == torch.float32 else 2.0) + around


def moved_weights(shape: ModelShape) -> int:
    """Weights of o_proj and down_proj, which closed-form steps move."""
    assert set(READER_OF.values()) == {"o_proj", "down_proj"}
    return sum(
        shape.hidden * (layer.heads * layer.head_dim + layer.channels) for layer in shape.layers
    )


def adapter(shape: ModelShape, rank: int) -> float:
    """Bytes of LoRA: factors, gradients and two moments in fp32."""
    sides = 0
    for layer in shape.layers:
        queries, keys = (n * layer.head_dim for n in (layer.heads, layer.kv_heads))
        sides += 4 * shape.hidden + 2 * queries + 2 * keys  # q, k, v, o
        sides += 3 * (shape.hidden + layer.channels)
    return 16.0 * rank * sides


def activations(
    config: Config, shape: ModelShape, kind: Literal["dense", "lora", "generator"]
) -> float:
    """Bytes that a step's backward pass needs of its layers."""
    tokens = config.train.batch_blocks * config.dataset.block_tokens
    wide = 2 if config.train.precision == "no" else 1
    tuned = config.recovery.retrain and kind != "dense"
    # A token of a layer: bytes times channels, times hidden size (queries are as wide).
    by_channel, by_hidden = {
        "dense": (8.4, 22.0),
        "lora": (8.0, 16.0),
        "generator": (13.4, 34.0) if tuned else (10.4, 24.0),
    }[kind]
    layers = [
        by_channel * layer.channels + by_hidden * shape.hidden + 4 * layer.kv_heads * layer.head_dim
        for layer in shape.layers
    ]
    if config.train.checkpointing == "true":
        kept = 4.0 * shape.hidden * len(layers)
        scored = 2.0 * sum(layer.channels + shape.hidden for layer in shape.layers)
        return tokens * (kept + wide * max(layers) + (scored if kind == "generator" else 0))
    return tokens * wide * sum(layers)


def loss_bytes(config: Config, shape: ModelShape, *, taught: bool) -> float:
    """Logits of a chunk, their gradient, the head as autocast has it; with a teacher, its own."""
    tokens = config.train.batch_blocks * config.dataset.block_tokens
    chunk = min(tokens, CHUNK_TOKENS) * shape.vocabulary
    head = shape.vocabulary * shape.hidden * (2.0 if shape.tied else 0.0)
    half = 2.0 if config.train.precision != "no" else 4.0
    layers = 0.0
    if taught and config.recovery.distill_hidden:
        layers = 3 * 4.0 * tokens * len(shape.layers) * shape.hidden
    return chunk * (4 + 2 * half + (4 + half if taught else 0)) + head * (1 + taught) + layers


def _dense(config: Config, model: Model) -> Need:
    base = frozen_kind(config)
    shape = model.dense
    steps = {
        "weights": weights(shape, base),
        "LoRA and its moments": adapter(shape, config.lora.rank),
        "activations": activations(config, shape, "dense"),
        "loss": loss_bytes(config, shape, taught=False),
    }
    whole = count_parameters(shape).whole
    return Need(
        part="dense baseline",
        device=steps,
        host={"largest tensor": 8.0 * largest_tensor(shape)},
        disk={
            "dense/": model.stored.itemsize * whole,
            "checkpoint": 12 / 16 * steps["LoRA and its moments"],
        },
    )


def _tuned(config: Config, shape: ModelShape) -> Bytes:
    """Gradients and moments of kept weights, and their copies in autocast's type."""
    if not config.recovery.retrain:
        return {}
    moments = 2.0 if config.train.moments == "8bit" else 8.0
    copies = 0.0 if config.train.precision == "no" else 2.0
    kept = projections(shape)
    return {"kept weights' gradients": 4.0 * kept, "kept weights' moments": moments * kept,
            "kept weights' bf16 copies": copies * kept}  # fmt: skip


def _teacher(config: Config, model: Model) -> float:
    if not config.recovery.distill:
        return 0.0
    return weights(model.dense, frozen_kind(config))


def _joint(config: Config, model: Model, kept: Kind) -> list[Need]:
    shape, teacher = model.dense, _teacher(config, model)
    shares = not config.recovery.retrain and config.decision.space == "groups"
    base = weights(shape, kept)
    if shares and teacher:
        size = 4.0 if kept == torch.float32 else 2.0
        teacher = size * moved_weights(shape) + adapter(shape, config.lora.rank) / 4
    held = {"weights": base, "teacher": teacher}
    grams = [4.0 * (x.heads * x.head_dim) ** 2 + 4.0 * x.channels**2 for x in shape.layers]
    repair = {}
    if config.repairs_along:
        repair = {"repair": 1.25 * sum(grams)}  # And its folds, largest where half is kept.
    narrow_copies = 0.0 if config.recovery.retrain else 2.0 * projections(model.slim)
    lora = adapter(shape, config.lora.rank)
    steps = held | repair | dict(_tuned(config, shape)) | {
        "narrow copies": narrow_copies,
        "LoRA and its moments": lora,
        "activations": max(
            activations(config, model.slim, "lora"),
            activations(config, shape, "generator") if config.decision.learn else 0.0,
        ),
        "loss": loss_bytes(config, shape, taught=bool(teacher)),
    }  # fmt: skip
    checkpoint = lora * 12 / 16 + (12.0 * projections(shape) if config.recovery.retrain else 0.0)
    frozen = {"dense model, taken apart": base, "narrow model": weights(model.slim, kept),
              "LoRA": lora / 4,
              "logits": 8.0 * config.dataset.block_tokens * shape.vocabulary}  # fmt: skip
    frozen["dense model, taken apart"] -= frozen["narrow model"]  # Never both whole.
    host = {"largest tensor": 8.0 * largest_tensor(shape)}
    matched = {}
    if config.recovery.approach_blocks:
        matched = {"teacher to match": weights(shape, frozen_kind(config))}
    return [
        Need(part="before the joint steps",
             device=held | repair | matched | _closed_form(config, shape),
             host=host),
        Need(part="joint steps", device=steps, host=host, disk={"checkpoint": checkpoint}),
        Need(part="freeze", device=frozen, host=host,
             disk={"frozen": weights(model.slim, kept) + lora / 4}),
    ]  # fmt: skip


def _closed_form(config: Config, shape: ModelShape) -> dict[str, float]:
    """Repair, or match to the teacher, whichever takes more: streams beside one layer."""
    widest = max(layer.channels for layer in shape.layers)
    gram = 4.0 * widest**2
    match = min(config.recovery.approach_blocks, config.train_blocks) * config.dataset.block_tokens
    repaired = config.recovery.reconstruct_blocks * config.dataset.block_tokens
    # Of a token: both streams before, between and after attention and MLP; gate, up, their
    # product, in fp32 too, and what it counts for.
    matched = match * (24.0 * shape.hidden + 16.0 * widest) + 4 * gram if match else 0.0
    mended = repaired * (24.0 * shape.hidden + 22.0 * widest) + 4 * gram if repaired else 0.0
    return {"closed-form steps": max(matched, mended)}


def _recovery(config: Config, model: Model, kept: Kind) -> Need:
    lora = adapter(model.slim, config.lora.rank)
    checkpoint = lora * 12 / 16 + (
        12.0 * projections(model.slim) if config.recovery.retrain else 0.0
    )
    return Need(
        part="recovery",
        device={
            "weights": weights(model.slim, kept),
            "teacher": _teacher(config, model),
            **_tuned(config, model.slim),
            "LoRA and its moments": lora,
            "activations": activations(config, model.slim, "dense"),
            "loss": loss_bytes(config, model.slim, taught=bool(config.recovery.distill)),
        },
        host={"largest tensor": 8.0 * largest_tensor(model.slim)},
        disk={"checkpoint": 2 * checkpoint, "tuned": weights(model.slim, kept) + lora / 4},
    )


def _after(config: Config, model: Model) -> list[Need]:
    """shrink, export and verify: on the CPU, whatever the device."""
    dense, slim = (count_parameters(shape).whole for shape in (model.dense, model.slim))
    tensor = 8.0 * largest_tensor(model.dense)
    calibrated = config.export.quantizer in ("auto", "gptq") and config.export.precision == "int4"
    export: dict[str, float] = {"two of the largest tensor": tensor}
    disk: dict[str, float] = {"onnx/ and onnx-dense/": model.dense_onnx + model.slim_onnx}
    if calibrated:
        widest = max(layer.channels for layer in model.dense.layers)
        layer = projections(model.dense) / len(model.dense.layers)
        export = {"gptq: a layer, its gram in fp64 three times": 4.0 * layer + 28.0 * widest**2,
                  "logits of a block": 16.0 * config.dataset.block_tokens * model.dense.vocabulary,
                  "largest tensor": tensor / 2}  # fmt: skip
        streams = 4.0 * CALIBRATION_TOKENS * model.dense.hidden * (len(model.dense.layers) + 1)
        disk["grams, for a time"] = streams + 4.0 * len(model.dense.layers) * (
            3 * model.dense.hidden**2 + widest**2
        )
    judged = {"model, in fp32": 4.0 * dense, "its fp32 graph": 4.0 * dense,
              "as shipped": float(model.dense_onnx)}  # fmt: skip
    return [
        Need(part="shrink", device={}, host={"two of the largest tensor": tensor},
             disk={"slim/": model.stored.itemsize * slim}),
        Need(part="export", device={}, host=export, disk=disk),
        Need(part="verify", device={}, host=judged, disk={"fp32 graph, for a time": 4.0 * dense}),
    ]  # fmt: skip
