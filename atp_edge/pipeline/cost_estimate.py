"""What a run will keep and need, from the configuration alone: no weights are loaded."""

from __future__ import annotations

import torch
from rich.table import Table
from rich.text import Text

from atp_edge.config import Config
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.generator import WIDTH
from atp_edge.decision.projection import project
from atp_edge.losses import CHUNK_TOKENS
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.plan import narrow_shape, plan_of
from atp_edge.model.storage import context_of
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.summary import megabytes, millions
from atp_edge.training.setup import feasible_of, shipped_of, source_config

_FP32 = 4


def cost_table(config: Config) -> Table:
    """Parameters, bytes, steps and memory. Raises ValueError when the budget cannot be met."""
    source = source_config(config)
    shape, feasible = model_shape(source), feasible_of(config, source)
    slim, shipped = even_shape(shape, feasible), shipped_of(config, source)
    count, left = count_parameters(shape), count_parameters(slim)
    title = Text(f"{config.model}, {config.data}, {config.budget}")
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    shown.add_column("dense", justify="right", no_wrap=True)
    shown.add_column("slim, about", justify="right", no_wrap=True)
    shown.add_row("decoder parameters", millions(count.decoder), millions(left.decoder))
    shown.add_row("all parameters", millions(count.whole), millions(left.whole))
    shown.add_row(
        f"onnx/ in {config.export.precision}",
        f"{shipped.bytes(shape) / 1e6:.1f} MB",
        f"{shipped.bytes(slim) / 1e6:.1f} MB",
    )
    own = source.max_position_embeddings
    shown.add_row("context, tokens", f"{own:,}", f"{context_of(source, config.export.context):,}")
    joint = config.control_steps
    steps = f"{joint} joint + {config.steps - joint}"
    shown.add_row("steps", f"{config.steps}", steps)
    shown.add_row("train tokens", f"{config.train_tokens:,}", f"{config.train_tokens:,}")
    shown.add_row("memory to train, about", "", megabytes(_training_bytes(config, shape, feasible)))
    return shown


def even_shape(shape: ModelShape, feasible: FeasibleDecisions) -> ModelShape:
    """A decoder that meets the budget and loses the same share at every site."""
    masks = project([torch.linspace(1, 0, s.size) for s in feasible.sites], feasible).masks
    kept = [tuple(mask.nonzero().flatten().tolist()) for mask in masks]
    return narrow_shape(shape, plan_of(shape, kept, feasible.sites[0].space))


def _training_bytes(config: Config, shape: ModelShape, feasible: FeasibleDecisions) -> int:
    """The largest of joint loop, recovery and the step to the teacher's layers before either:
    weights, the teacher, gradients, Adam's moments, what the moving repair measured, what the
    backward pass keeps, and the loss; or both models' streams beside one MLP.

    An estimate from sizes alone: PyTorch's own 0.8 GB come on top. Of the demo model 4.7 GB were
    measured on a CPU where this says 3.7; on a GPU, in steps of 64 blocks, 31 where it says 42.
    """
    count, slim = count_parameters(shape), feasible.fixed + feasible.allowed
    generator = sum(site.size for site in feasible.sites) * WIDTH
    teacher = count.whole if config.recovery.distill else 0
    trained = 3 if config.recovery.retrain else 0  # a gradient and two moments a parameter
    grams = sum((x.heads * x.head_dim) ** 2 + x.channels**2 for x in shape.layers)
    # And its folds, largest where half is kept.
    repair = grams * 5 // 4 if config.repairs_along else 0
    joint = count.whole + trained * count.decoder + 4 * generator + repair
    recovery = count.around + slim + trained * slim
    tokens = config.train.batch_blocks * config.dataset.block_tokens
    # What a layer keeps for its backward pass, in values a token: the inputs of its norms and
    # projections, gate, up and their product. Attention keeps no scores, on a CPU or a GPU.
    kept = sum(12 * shape.hidden + 6 * layer.channels for layer in shape.layers)
    activation = 4 if config.train.precision == "no" else 2
    loss = 3 * min(tokens, CHUNK_TOKENS) * shape.vocabulary
    if config.recovery.distill and config.recovery.distill_hidden:
        # Every layer's output, the teacher's, and their difference.
        loss += 3 * tokens * len(shape.layers) * shape.hidden
    steps = (max(joint, recovery) + teacher + loss) * _FP32 + tokens * kept * activation
    approached = min(config.recovery.approach_blocks, config.train_blocks)
    if not approached:
        return steps
    # Of every token the two streams before, between and after attention and MLP, gate, up, their
    # product, and what it counts for.
    held = 6 * shape.hidden + 4 * max(layer.channels for layer in shape.layers)
    approach = 2 * count.whole + teacher + repair + approached * config.dataset.block_tokens * held
    return max(steps, approach * _FP32)
