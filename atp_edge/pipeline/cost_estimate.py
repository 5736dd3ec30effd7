"""What a run will keep and need, from the configuration alone: no weights are loaded."""

from __future__ import annotations

import math

import torch
from rich.table import Table
from rich.text import Text

from atp_edge.config import Config
from atp_edge.data.splits import Splits
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.decision.projection import project
from atp_edge.model.families import ModelShape, model_shape
from atp_edge.model.plan import Plan, narrow_shape, plan_of
from atp_edge.model.storage import context_of
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.device import ROOM, Device
from atp_edge.pipeline.fit import done_here
from atp_edge.pipeline.memory_need import Model, Need
from atp_edge.pipeline.summary import millions
from atp_edge.training.frozen import source_type
from atp_edge.training.setup import feasible_of, model_source, shipped_of, source_config


def cost_table(config: Config) -> Table:
    """Parameters, bytes and steps.

    Raises ValueError when the budget cannot be met.
    """
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
    return shown


def text_table(config: Config, splits: Splits) -> Table:
    """What the text holds, split by split, and how often training reads it."""
    report = splits.report
    shown = Table(title="the text", title_justify="left")
    shown.add_column("", no_wrap=True)
    names = tuple(report.documents)
    for name in ("all", *names):
        shown.add_column(name, justify="right", no_wrap=True)
    for what, counts in (("documents", report.documents), ("tokens", report.tokens)):
        shown.add_row(what, f"{sum(counts.values()):,}", *(f"{counts[name]:,}" for name in names))
    times = config.train_tokens / splits.train.input_ids.numel()
    shown.add_row("read in training", "", f"{times:.2f} times")
    return shown


def even_shape(shape: ModelShape, feasible: FeasibleDecisions) -> ModelShape:
    """A decoder that meets the budget and loses the same share at every site."""
    return narrow_shape(shape, even_plan(shape, feasible))


def even_plan(shape: ModelShape, feasible: FeasibleDecisions) -> Plan:
    """A plan that meets the budget, with the same share at every site."""
    masks = project([torch.linspace(1, 0, s.size) for s in feasible.sites], feasible).masks
    return plan_of(shape, masks.kept(), feasible.sites[0].space)


def sized_model(config: Config) -> Model:
    """The run's model, dense and about as it will be cut."""
    folder, source = model_source(config.model), source_config(config)
    shape, feasible = model_shape(source), feasible_of(config, source)
    slim, shipped = even_shape(shape, feasible), shipped_of(config, source)
    return Model(
        dense=shape,
        slim=slim,
        stored=source_type(folder),
        dense_onnx=shipped.bytes(shape),
        slim_onnx=shipped.bytes(slim),
    )


def needs_table(found: list[Need], device: Device) -> Table:
    """What every part takes, beside what there is, in GB; a CPU's memory is the host's."""
    apart = device.kind == "cuda"
    title = Text(f"memory and disk, about, GB ({device.name})")
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for name in ("device", "host", "disk") if apart else ("memory", "disk"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("most of it")
    for need in (done_here(device, need) for need in found):
        most = need.device or need.host
        largest = sorted(most, key=lambda name: -most[name])[:2]
        taken: tuple[float, ...] = (need.device_bytes,)
        if apart:
            taken = (need.device_bytes, need.host_bytes)
        if need.least and max(taken) > ROOM * device.host:
            taken = tuple(min(size, max(need.least, ROOM * device.host)) for size in taken)
            largest = []
        shown.add_row(
            need.part,
            *(f"{size / 1e9:.1f}" if size else "" for size in (*taken, need.disk_bytes)),
            ", ".join(f"{name} {most[name] / 1e9:.1f}" for name in largest)
            or "some layers at a time",
        )
    there = (device.memory, device.host, device.disk) if apart else (device.memory, device.disk)
    known = (f"{size / 1e9:.1f}" if math.isfinite(size) else "" for size in there)
    shown.add_row("there is", *known, "")
    return shown
