"""What the report page says in words and tables, rounded as people read it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atp_edge.config import Config
from atp_edge.model.checkpoint import shape_of
from atp_edge.model.plan import Plan
from atp_edge.pipeline.shipped_quality import shipped_perplexity
from atp_edge.pipeline.verdict import recovery_interval
from atp_edge.run.records import STAGES
from atp_edge.run.time_left import in_words
from atp_edge.settings import keys, read_config, values_of

SLICES = ("easiest third", "middle third", "hardest third")
CACHE_BYTES = 4
"""Of a value of the KV cache in fp32."""


def about(run: Path, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) for the top of the page: model, text, date and the command."""
    path = run / "config.toml"
    if not path.exists():
        return []
    try:
        config = read_config(path)
    except ValueError:  # A report is of what there is; the settings are shown as they lie there.
        return []
    found = [
        ("model", _named(config.model, "demo: SmolLM2-135M-Instruct, dequantized from Q4_1")),
        ("text", _text(config, metrics)),
    ]
    date = metrics.get("bench", {}).get("environment", {}).get("date")
    if date:
        found.append(("date", str(date)))
    return [*found, ("command", command_of(config))]


def command_of(config: Config) -> str:
    """What gives this run again: the settings that are not the defaults."""
    values = values_of(config)
    parts = ["atp-edge run"]
    for key in keys():
        value = values[key.name]
        if value == key.default and key.name not in ("model", "data", "budget", "out"):
            continue
        if key.type is bool:
            parts.append(key.flag if value else f"--no-{key.flag[2:]}")
        else:
            parts.append(f"{key.flag} {shlex.quote(str(value))}")
    return " ".join(parts)


def _named(model: str, demo: str) -> str:
    return demo if model == "demo" else Path(model).name


def _text(config: Config, metrics: dict[str, Any]) -> str:
    data = metrics.get("train", {}).get("data", {})
    name = Path(config.data).name
    if not data:
        return name
    documents, tokens = sum(data["documents"].values()), sum(data["tokens"].values())
    return f"{name}: {documents:,} documents, {tokens:,} tokens"


def slices_of(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """(slice, untouched, dense tuned, slim) perplexity: thirds of the test blocks by how hard the
    untouched model finds them, and all of them."""
    losses = metrics.get("train", {}).get("block_losses", {})
    rows = [losses.get(name) for name in ("untuned", "dense", "slim")]
    if not all(rows) or len({len(row) for row in rows}) > 1 or len(rows[0]) < 2 * len(SLICES):
        return []
    order = np.array_split(np.argsort(rows[0]), len(SLICES))
    parts = zip(SLICES, order, strict=True)
    return [
        (name, *(f"{math.exp(float(np.mean(np.array(row)[part]))):.2f}" for row in rows))
        for name, part in parts
    ]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer's widths: kept of all, and the bytes of cache that a token takes."""

    layer: int
    groups: str
    channels: str
    cache: str


def layers_of(run: Path, plan: Plan | None) -> list[LayerRow]:
    """Widths and cache of every layer of the slim model, and of all; nothing before it is there."""
    if plan is None or not all((run / n / "config.json").exists() for n in ("slim", "dense")):
        return []
    slim, dense = shape_of(run / "slim").layers, shape_of(run / "dense").layers
    caches = [2 * x.kv_heads * x.head_dim * CACHE_BYTES for x in slim]
    whole = [2 * x.kv_heads * x.head_dim * CACHE_BYTES for x in dense]
    rows = [
        LayerRow(
            layer=i,
            groups=f"{ours.kv_heads} of {theirs.kv_heads}",
            channels=f"{ours.channels:,} of {theirs.channels:,}",
            cache=f"{cache:,}",
        )
        for i, (ours, theirs, cache) in enumerate(zip(slim, dense, caches, strict=True))
    ]
    total = LayerRow(
        layer=-1,
        groups=f"{sum(x.kv_heads for x in slim)} of {sum(x.kv_heads for x in dense)}",
        channels=f"{sum(x.channels for x in slim):,} of {sum(x.channels for x in dense):,}",
        cache=f"{sum(caches):,} of {sum(whole):,}",
    )
    return [*rows, total]


def times_of(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(stage, time) of what says how long it took."""
    found = []
    if "train" in metrics:
        found.append(("training, all parts", in_words(metrics["train"]["seconds"])))
    stages = ((name, metrics.get(name, {}).get("seconds")) for name in STAGES if name != "train")
    return [*found, *((name, in_words(seconds)) for name, seconds in stages if seconds)]


def training_facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of training and of the text."""
    if "train" not in metrics:
        return []
    train, ends = metrics["train"], recovery_interval(metrics)
    data = train.get("data", {})
    recovery = f"{train['dense_tuned_perplexity'] / shipped_perplexity(metrics):.3f}"
    facts = [
        ("budget", train["budget"]),
        ("kept", f"{train['decoder_share']:.1%} of the decoder, {train['whole_share']:.1%} of all"),
        ("steps, tokens", f"{train['steps']:,}, {train['tokens']:,}"),
        ("perplexity at the freeze", f"{train['perplexity_at_freeze']:.2f}"),
        ("recovery", f"{recovery} (95 %: {ends[0]:.3f} to {ends[1]:.3f})" if ends else recovery),
        ("step kept", str(train.get("kept_step", train["steps"]))),
        *(("went back", text) for text in train.get("returns", [])),
        ("plan, SHA-256", train["plan_sha256"]),
    ]  # fmt: skip
    for name in ("documents", "tokens"):
        if name in data:
            facts.append((name, ", ".join(f"{k} {v:,}" for k, v in data[name].items())))
    if "duplicates_removed" in data:
        facts.append(("near copies left out", f"{data['duplicates_removed']:,}"))
    if "sha256" in data:
        facts.append(("text, SHA-256", data["sha256"]))
    return facts
