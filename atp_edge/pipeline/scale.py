"""docs/scale.md: what real sizes take, from the same estimate as `--dry-run`.

`python -m atp_edge.pipeline.scale` prints the page.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atp_edge.config import Config
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.cost_estimate import sized_model
from atp_edge.pipeline.device import USABLE, Device
from atp_edge.pipeline.fit import fitted, refuse
from atp_edge.pipeline.memory import needs_of
from atp_edge.pipeline.memory_need import Model, Need
from atp_edge.settings import with_values

STEPS, BLOCKS = 2000, 8
"""Of 8 blocks of 512 tokens: 8.2 M tokens."""
SEVERAL = 8
"""Cards of a machine."""
STEP_FLOOR = 0.25
"""Seconds of a step below which the host's launches rule (9,000 launches; docs/kernels.md)."""
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
          "dtype": "bfloat16", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}  # fmt: skip
_NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
SIZES = {
    "1B (Llama 3.2)": (128256, 2048, 8192, 16, 32, 8, True),
    "3B (Llama 3.2)": (128256, 3072, 8192, 28, 24, 8, True),
    "8B (Llama 3)": (128256, 4096, 14336, 32, 32, 8, False),
    "13B (Llama 2)": (32000, 5120, 13824, 40, 40, 40, False),
    "70B (Llama 3)": (128256, 8192, 28672, 80, 64, 8, False),
}
"""By the model's name, the values of `_NAMES`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """memory in bytes, rate in achieved bf16 FLOP/s, price in dollars an hour."""

    name: str
    memory: float
    rate: float
    price: float


CARDS = (
    Card(name="24 GB", memory=24e9, rate=80e12, price=0.5),
    Card(name="48 GB", memory=48e9, rate=180e12, price=1.0),
    Card(name="80 GB", memory=80e9, rate=600e12, price=2.5),
    Card(name="141 GB", memory=141e9, rate=600e12, price=3.5),
)


def page() -> str:
    """The whole document."""
    return _HEAD + "\n".join(_rows()) + "\n" + _on_several() + _parts_of_8b() + _TAIL


@cache
def model_of(name: str) -> tuple[Config, Model]:
    """A run's settings and sizes, for a model by its name here."""
    config = dict(_LLAMA) | dict(zip(_NAMES, SIZES[name], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        values = {"model": folder, "steps": STEPS, "train.batch_blocks": BLOCKS}
        run = with_values(Config(), values)
        return run, sized_model(run)


def device_of_card(card: Card, count: int = 1) -> Device:
    """So many cards of a kind, on a host that has enough of all else."""
    return Device(kind="cuda", name=card.name, memory=card.memory, host=math.inf, disk=math.inf,
                  quantizes=True, count=count)  # fmt: skip


def _rows() -> Iterator[str]:
    for name in SIZES:
        asked, model = model_of(name)
        for card in CARDS:
            device = device_of_card(card)
            config, _ = fitted(asked, model, (), device)
            try:
                refuse(config, model, device)
            except ValueError:
                yield f"| {name} | {card.name} | does not fit | | | | | |"
                continue
            needs = [n for n in needs_of(config, model, "cuda") if not n.can_wait]
            most = max(needs, key=lambda need: need.device_bytes)
            host = max(need.host_bytes for need in needs if need.part != "verify")
            disk = sum(need.disk_bytes for need in needs)
            hours = seconds(config, model, card) / 3600
            yield (
                f"| {name} | {card.name} | {_settings(config)} | {most.device_bytes / 1e9:.0f} "
                f"({most.part}) | {host / 1e9:.0f} | {disk / 1e9:.0f} | "
                f"{hours:.1f} | {hours * card.price:.0f} |"
            )


def _settings(config: Config) -> str:
    said = ["LoRA alone, rank 64" if not config.recovery.retrain else "kept weights tuned"]
    if config.train.moments == "8bit" and config.recovery.retrain:
        said.append("8-bit moments")
    said += ["checkpointing"] if config.train.checkpointing == "true" else []
    said += ["no repair"] if not config.recovery.reconstruct_blocks else []
    said += ["16 blocks matched"] if config.recovery.approach_blocks == 16 else []
    said += ["frozen weights shared out"] if config.train.shard else []
    said += ["nf4"] if config.train.base_dtype == "nf4" else []
    return ", ".join(said)


def seconds(config: Config, model: Model, card: Card, count: int = 1) -> float:
    """Of training: products alone, 2 FLOP a weight and token each way, at the rate of so many
    cards."""
    dense, slim = (count_parameters(shape).whole for shape in (model.dense, model.slim))
    again = 2 if config.train.checkpointing == "true" else 0
    tuned = 2 if config.recovery.retrain else 0
    taught = 2 * dense if config.recovery.distill else 0
    tokens = config.train.batch_blocks * config.dataset.block_tokens / count

    def step(weights: float, each: float, beside: float = 0) -> float:
        return max(STEP_FLOOR, tokens * (weights * (each + again) + beside) / card.rate)

    generator = step(dense, 4, taught) / config.decision.interval
    joint = step(slim, 4 + tuned, taught) + generator
    control = config.control_steps
    recovery = step(slim, 4 + tuned, taught)
    return config.steps * step(dense, 4) + control * joint + (config.steps - control) * recovery


def _on_several() -> str:
    lines = [
        "",
        f"## On {SEVERAL} cards",
        "",
        "The same run by torchrun, a block a card and step. Where a card does not hold the model",
        "beside all else, frozen weights are shared out (`train.shard`, FSDP2): a card holds its",
        "share, and gathers a layer at a time. Hours are those of one card over their number, and",
        "the time of the gathering is not in them: it was not measured.",
        "",
        "| model | cards | settings | peak of one, GB (part) | hours | $ |",
        "|---|---|---|---:|---:|---:|",
        *(_row_of_several(name, card) for name in SIZES for card in CARDS),
        "",
    ]
    return "\n".join(lines)


def _row_of_several(name: str, card: Card) -> str:
    asked, model = model_of(name)
    device = device_of_card(card, SEVERAL)
    config, _ = fitted(asked, model, (), device)
    try:
        refuse(config, model, device)
    except ValueError:
        return f"| {name} | {SEVERAL} x {card.name} | does not fit | | | |"
    needs = [n for n in needs_of(config, model, "cuda", SEVERAL) if not n.can_wait]
    most = max(needs, key=lambda need: need.device_bytes)
    hours = seconds(config, model, card, SEVERAL) / 3600
    return (
        f"| {name} | {SEVERAL} x {card.name} | {_settings(config)} | "
        f"{most.device_bytes / 1e9:.0f} ({most.part}) | {hours:.1f} | "
        f"{hours * SEVERAL * card.price:.0f} |"
    )


def _parts_of_8b() -> str:
    asked, model = model_of("8B (Llama 3)")
    config, _ = fitted(asked, model, (), device_of_card(CARDS[2]))
    lines = [
        "",
        "## 8B on 80 GB, part by part",
        "",
        f"With {_settings(config)}; GB at the peak, and what takes most of it.",
        "",
        "| part | device | host | disk | of it |",
        "|---|---:|---:|---:|---|",
        *(_part(need) for need in needs_of(config, model, "cuda")),
        "",
    ]
    return "\n".join(lines)


def _part(need: Need) -> str:
    held = need.device or need.host
    largest = sorted(held, key=lambda name: -held[name])[:4]
    shown = ", ".join(f"{name} {held[name] / 1e9:.1f}" for name in largest)
    sizes = (need.device_bytes, need.host_bytes, need.disk_bytes)
    cells = " | ".join(f"{size / 1e9:.1f}" if size else "" for size in sizes)
    return f"| {need.part} | {cells} | {shown} |"


_HEAD = (
    f"""# Real sizes

**All figures here are arithmetic.** No model above 135M parameters has been trained with
atp-edge on a GPU. What was measured is said under [Measured](#measured). The page is written by
`python -m atp_edge.pipeline.scale`, from the estimate that `--dry-run` shows for your own run:

```sh
atp-edge run --config examples/paper/llama-3-8b-legal.toml --dry-run --device-memory 80GB
```

A run of {STEPS:,} steps of {BLOCKS} blocks of 512 tokens, 60 % of the decoder kept. Settings are
those that are chosen where you name none: the first way that fits {USABLE:.0%} of the card. Each
takes less than the one before it: activation checkpointing; 8-bit moments; LoRA alone at rank 64
in place of tuned kept weights, on a bf16 base that the teacher shares; no repair; fewer blocks
for the match to the teacher; an nf4 base. Hours are training alone: 2 FLOP a weight and token
for a forward product and for each gradient that is taken, at the rate below, and {STEP_FLOOR} s
a step at least. Dollars are hours times the price below.

| card | achieved bf16 TFLOP/s, assumed | $ an hour, assumed |
|---|---:|---:|
"""
    + "".join(f"| {c.name} | {c.rate / 1e12:.0f} | {c.price} |\n" for c in CARDS)
    + """
| model | card | settings | peak, GB (part) | host, GB | disk, GB | hours | $ |
|---|---|---|---:|---:|---:|---:|---:|
"""
)
_TAIL = """
## How each figure is made

- **weights**: bytes a weight of every projection (4 in fp32, 2 in bf16, 0.516 in nf4), and fp32
  for embeddings and norms. Above a size the frozen base is what its checkpoint is, bf16.
- **teacher**: the dense base with an adapter of its own. While the decision is learned it is the
  student's base but for o_proj and down_proj, which the closed-form steps move; where kept weights
  are tuned, or frozen ones shared out, a model of its own.
- **kept weights**: where they are tuned, 4 bytes of gradient, 8 of moments (2 in 8 bits), 2 of a
  copy to compute with, and 4 of their own: a bf16 weight cannot hold a step.
- **activations**: bytes a token and layer counted by torch's saved-tensor hooks; with
  checkpointing, one layer's, and 4 bytes times the hidden size of every other.
- **a part's peak**: what it holds throughout, and the largest of its moments: the loss at the end
  of a forward pass stands beside all activations, the kept weights' gradients at the end of the
  backward pass beside none.
- **shared out**: a share of the projections, and two layers that are gathered.
- **host**: weights are read, merged, cut and written one tensor at a time, so twice the largest
  tensor in fp32 and the runtime's own. verify is not counted in the table: it takes
  12 bytes a weight and what ships, of the whole model or, where the host has less, of as many
  layers at a time as it holds.
- **the gate** is not counted either: it holds the dense model beside what ships, in fp32, 4 bytes a
  weight and more, or, where that is not there, as its checkpoint stores it: each layer is fp32
  while it computes, so that the figures are the same, and takes longer. A run that fits but for its
  gate is begun, says so, and ends before its gate; on a larger machine the same line goes on.
- **disk**: dense/, slim/, onnx/ and onnx-dense/ in fp32, and the checkpoints.

The formulas are in `atp_edge/pipeline/memory_terms.py`, and what stands beside what in
`memory_training.py` and `memory_after.py`. A run notes what each part
really took in `memory.json`. Several devices: [several-devices.md](several-devices.md).

## Measured

"""


def main() -> None:
    """Print the page."""
    print(page())  # noqa: T201


if __name__ == "__main__":
    main()
