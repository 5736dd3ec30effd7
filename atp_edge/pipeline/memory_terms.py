"""What weights, activations, losses and closed-form steps take, in bytes: arithmetic from sizes.

Bytes a token and layer that a backward pass needs were counted by torch's saved-tensor hooks, under
bf16 autocast and in fp32 (tests/atp_edge/pipeline/test_memory.py counts them again).
"""

from __future__ import annotations

from typing import Literal

import torch

from atp_edge.config import Config
from atp_edge.decision.generator import WIDTH
from atp_edge.evaluation.text_loss import streamed_blocks
from atp_edge.losses import CHUNK_TOKENS
from atp_edge.model.families import READER_OF, ModelShape
from atp_edge.model.structures import count_parameters
from atp_edge.training.frozen import Kind

NF4_BYTES = 0.516
"""4 bits, and an 8-bit scale a block of 64 with its own fp32 one a block of 256."""
PROOF_BYTES = 12.0
"""A weight of a proof: the model's, its fp32 graph's, and that graph's file, as it is read."""
PROOF_MORE = 8.0
"""A value of the embedding beside them: with a faint stream, and as ONNX Runtime packs a head."""


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


def held_weights(shape: ModelShape, base: Kind, ranks: int) -> float:
    """Of a model that is shared out over so many ranks: a share of the projections, and two layers
    that are gathered, one to compute with and the next."""
    whole = weights(shape, base)
    if ranks == 1:
        return whole
    shared = whole - 4.0 * count_parameters(shape).around
    return whole - shared * (1 - 1 / ranks) + 2 * shared / len(shape.layers)


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


def tokens_at_once(config: Config) -> int:
    """That go through a model together in a step."""
    blocks = config.train.batch_blocks
    return min(blocks, config.train.micro_blocks or blocks) * config.dataset.block_tokens


def activations(
    config: Config, shape: ModelShape, kind: Literal["dense", "lora", "generator"]
) -> float:
    """Bytes that a step's backward pass needs of its layers."""
    tokens = tokens_at_once(config)
    in_fp32 = config.train.precision == "no"
    wide = 2 if in_fp32 else 1
    tuned = config.recovery.retrain and kind != "dense"
    # A token of a layer: bytes times channels, times hidden size (queries are as wide).
    if in_fp32:
        by_channel, by_hidden = (20.0, 31.0) if kind == "generator" else (16.0, 27.0)
    else:
        by_channel, by_hidden = {
            "dense": (8.4, 22.0),
            "lora": (8.0, 16.0),
            "generator": (13.4, 34.0) if tuned else (10.4, 24.0),
        }[kind]
    layers = [
        by_channel * layer.channels
        + by_hidden * shape.hidden
        + 4 * wide * layer.kv_heads * layer.head_dim
        for layer in shape.layers
    ]
    if config.train.checkpointing == "true":
        kept = 4.0 * shape.hidden * len(layers)
        scored = 2.0 * sum(layer.channels + shape.hidden for layer in shape.layers)
        return tokens * (kept + max(layers) + wide * (scored if kind == "generator" else 0))
    return tokens * sum(layers)


def loss_bytes(config: Config, shape: ModelShape, *, taught: bool) -> float:
    """Logits of a chunk, their gradient, the head as autocast has it; with a teacher, its own."""
    tokens = tokens_at_once(config)
    chunk = min(tokens, CHUNK_TOKENS) * shape.vocabulary
    head = shape.vocabulary * shape.hidden * (2.0 if shape.tied else 0.0)
    half = 2.0 if config.train.precision != "no" else 4.0
    layers = 0.0
    if taught and config.recovery.distill_hidden:
        layers = 3 * 4.0 * tokens * len(shape.layers) * shape.hidden
    return chunk * (4 + 2 * half + (4 + half if taught else 0)) + head * (1 + taught) + layers


def frozen_copies(shape: ModelShape, kind: Kind, config: Config) -> float:
    """Bytes of the projections in autocast's type, where they are kept in another."""
    other = kind == torch.float32 and config.train.precision != "no"
    return 2.0 * projections(shape) if other else 0.0


def streamed_loss(config: Config, shape: ModelShape, stored: int) -> dict[str, float]:
    """What the loss of a test split holds that goes through a model layer by layer: the head, as it
    is stored (bytes a weight) and in fp32, and either a layer's activations or a block's logits."""
    block = config.dataset.block_tokens
    read = min(streamed_blocks(shape, block), config.dataset.test_blocks) * block
    layer = 4.0 * read * (3 * widest(shape) + 4 * shape.hidden)
    return {
        "largest tensor": (4.0 + stored) * largest_tensor(shape),
        "text": max(layer, 8.0 * block * shape.vocabulary),
    }


def moments(config: Config, shape: ModelShape) -> float:
    """Of the kept weights, where they are tuned."""
    if not config.recovery.retrain:
        return 0.0
    return (2.0 if config.train.moments == "8bit" else 8.0) * projections(shape)


def generator(config: Config, shape: ModelShape) -> float:
    """Of the decision: a head a site, its gradient and two moments."""
    sizes = sum(layer.kv_heads + layer.channels for layer in shape.layers)
    return 16.0 * WIDTH * sizes if config.decision.learn else 0.0


def grams(config: Config, shape: ModelShape) -> float:
    """What a repair that follows the decision keeps: a gram a site, and its folds, a quarter of
    that where half is kept."""
    if not config.repairs_along:
        return 0.0
    return 1.25 * sum(4.0 * ((x.heads * x.head_dim) ** 2 + x.channels**2) for x in shape.layers)


def mended(config: Config, shape: ModelShape) -> float:
    """What the repair's pass holds: its text goes through the model at once, a layer at a time."""
    tokens = config.recovery.reconstruct_blocks * config.dataset.block_tokens
    # Of a token: both streams before, between and after attention and MLP; gate, up, their
    # product, in fp32 too, and what it counts for.
    return tokens * (24.0 * shape.hidden + 22.0 * widest(shape)) + _four_grams(shape)


def matched(config: Config, student: ModelShape, teacher: ModelShape) -> float:
    """What the match to the teacher holds of its text, beside both models."""
    blocks = min(config.recovery.approach_blocks, config.train_blocks)
    tokens = blocks * config.dataset.block_tokens
    return tokens * (
        24.0 * teacher.hidden + 8.0 * (widest(student) + widest(teacher))
    ) + _four_grams(student)


def widest(shape: ModelShape) -> int:
    """Channels of the widest MLP."""
    return max(layer.channels for layer in shape.layers)


def _four_grams(shape: ModelShape) -> float:
    return 16.0 * widest(shape) ** 2


def proof(shape: ModelShape, shipped: float, layers: int) -> float:
    """Bytes of a proof of so many of a model's layers with its embedding and head: the model in
    fp32, its graph in fp32 (as it is run, and as its file lies), and what ships. shipped: bytes of
    the exported folder."""
    count, table = count_parameters(shape), shape.vocabulary * shape.hidden
    part = count.around + count.decoder * layers / len(shape.layers)
    return part * (PROOF_BYTES + shipped / count.whole) + PROOF_MORE * table


def layers_at_once(shape: ModelShape, shipped: float, room: float) -> int:
    """Layers of a model that a proof takes at once, in so many bytes; all, if they fit; 1 at
    least."""
    each = proof(shape, shipped, 1) - proof(shape, shipped, 0)
    return max(1, min(len(shape.layers), int((room - proof(shape, shipped, 0)) / each)))
