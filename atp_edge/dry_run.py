"""What a run will keep and need, from the configuration alone: no weights are loaded."""

from __future__ import annotations

from rich.table import Table
from transformers import AutoConfig

from atp_edge.config import Config
from atp_edge.families import model_shape
from atp_edge.inputs import BYTES_PER_PARAMETER, model_source, space_of
from atp_edge.structures import count_parameters
from atp_edge.summary import megabytes, millions

_FP32 = 4


def cost_table(config: Config) -> Table:
    """Parameters, bytes, steps and memory. Raises ValueError when the budget cannot be met."""
    source = AutoConfig.from_pretrained(model_source(config.model))
    space = space_of(config, source)
    count = count_parameters(model_shape(source))
    slim = space.fixed + space.allowed
    each = BYTES_PER_PARAMETER[config.export.precision]
    tokens = config.steps * config.train.batch_blocks * config.dataset.block_tokens
    generator = sum(site.size for site in space.sites) * 64
    # Recovery holds the teacher, the narrow model, its gradients and both of Adam's moments.
    trained = slim if config.recovery.retrain else 0
    teacher = count.whole if config.recovery.distill else 0
    recovery = (teacher + slim + count.around + 3 * trained) * _FP32
    control = (count.whole + 4 * generator) * _FP32
    logits = config.train.batch_blocks * config.dataset.block_tokens * source.vocab_size * _FP32
    shown = Table(title=f"{config.model}, {config.data}, {config.budget}", title_justify="left")
    shown.add_column("", no_wrap=True)
    shown.add_column("dense", justify="right", no_wrap=True)
    shown.add_column("slim, at most", justify="right", no_wrap=True)
    shown.add_row("decoder parameters", millions(count.decoder), millions(slim))
    shown.add_row("all parameters", millions(count.whole), millions(slim + count.around))
    shown.add_row(
        f"weights as {config.export.precision}",
        megabytes(count.whole * each),
        megabytes((slim + count.around) * each),
    )
    joint = config.control_steps
    steps = f"{joint} joint + {config.steps - joint}"
    shown.add_row("steps", f"{config.steps}", steps)
    shown.add_row("train tokens", f"{tokens:,}", f"{tokens:,}")
    memory = max(control, recovery) + 3 * logits
    shown.add_row("memory to train, about", "", megabytes(memory))
    return shown
