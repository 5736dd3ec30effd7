"""A few layers through the steps of a run, by us and by peft: GPU time, wall, launches, peak.

A step here is forward and backward of the layers, from a gradient of ones: no head, no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atp_bench.acceptance.backend import kernels_by, triton_absent
from atp_bench.acceptance.models import (
    llama_with_lora,
    random_blocks,
    random_llama,
    random_masks,
)
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import clocked_ms, free, host_costs, prepare, sampler
from atp_edge.decision.regularizer import proximal_step
from atp_edge.masking.apply import set_decision
from atp_edge.masking.fused_layers import fuse_layers
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_peft
from atp_edge.model.plan import plan_of

REFERENCE = "peft, bf16, dense"
_VOCABULARY = 512  # Neither embedding nor head is what is measured.


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """By step: what it costs, and over peft's dense step."""
    found: dict[str, Any] = {"layers": sizes.few_layers, "tokens": sizes.tokens, "steps": {}}
    for name, made in _steps(sizes):
        with made as run:
            found["steps"][name] = _costs(run, sizes)
        _ratios(found["steps"])
        keep(found)
        free()
    return found


def _steps(sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """Name, and a context that gives the step."""
    yield REFERENCE, _peft(sizes, torch.bfloat16)
    yield "peft, fp32 adapters, dense", _peft(sizes, torch.float32)
    more = [] if triton_absent(sizes.device) else ["triton"]
    backends = ["torch", "joined", *more]
    for backend in backends:
        for kind in ("dense", "joint", "generator", "recovery"):
            yield f"ours, {kind}, {backend}", _ours(sizes, kind, backend)


@contextmanager
def _peft(sizes: Sizes, adapters: torch.dtype) -> Iterator[Callable[[], None]]:
    """peft's own LoRA on the same base; bf16 throughout, or fp32 adapters as peft makes them."""
    base = random_llama(sizes.config(sizes.few_layers, vocabulary=_VOCABULARY), sizes.device,
                        sizes.dtype).to(sizes.dtype)  # fmt: skip
    config = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, task_type="CAUSAL_LM",
                        target_modules="all-linear")  # fmt: skip
    model = get_peft_model(base, config, autocast_adapter_dtype=adapters == torch.float32)
    yield _step(model, sizes, autocast=False)


@contextmanager
def _ours(sizes: Sizes, kind: str, backend: Any) -> Iterator[Callable[[], None]]:
    """The model as it stands in this step of a run: a bf16 base, LoRA in fp32, autocast."""
    with kernels_by(backend):
        if kind == "recovery":
            model: Any = _narrow(sizes)
        else:
            model = llama_with_lora(sizes, layers=sizes.few_layers, vocabulary=_VOCABULARY)
        if kind == "joint":
            masks = random_masks(model, sizes, fixed=True)
            proximal_step(model, masks, 1e6)  # As near the freeze: LoRA of what is removed is zero.
            set_decision(model, masks, "base")
        if kind == "generator":
            set_decision(model, random_masks(model, sizes, fixed=False), "whole")
        fuse_layers(model)  # As a learner does; nothing on torch's path.
        yield _step(model, sizes, autocast=True)


def _narrow(sizes: Sizes) -> Any:
    wide = llama_with_lora(sizes, layers=sizes.few_layers, vocabulary=_VOCABULARY)
    masks = random_masks(wide, sizes, fixed=True)
    plan = plan_of(model_shape(wide.get_base_model().config), masks.kept(), "groups")
    return narrow_peft(wide, plan, take=True)


def _step(model: Any, sizes: Sizes, *, autocast: bool) -> Callable[[], None]:
    blocks = random_blocks(sizes, vocabulary=_VOCABULARY)
    decoder: nn.Module = model.get_base_model().model
    learned = [p for p in model.parameters() if p.requires_grad]
    kept: dict[str, torch.Tensor] = {}

    def run() -> None:
        on = torch.autocast(sizes.device, dtype=sizes.dtype) if autocast else nullcontext()
        with on:
            hidden = decoder(input_ids=blocks.input_ids, use_cache=False).last_hidden_state
        if "ones" not in kept:
            kept["ones"] = torch.ones_like(hidden)
        torch.autograd.grad(hidden, learned, kept["ones"], allow_unused=True)

    return run


def _costs(run: Callable[[], None], sizes: Sizes) -> dict[str, Any]:
    costs = host_costs(run, sizes.device)
    if sizes.device == "cuda":
        replay, graph = prepare(run, sizes.device)
        sample = sampler(replay, sizes.device)
        costs |= {"graph": graph, "replayed_ms": min(sample() for _ in range(sizes.rounds))}
    walls = sorted(clocked_ms(run) for _ in range(sizes.rounds))
    return costs | {"wall_ms": walls[len(walls) // 2]}


def _ratios(rows: dict[str, Any]) -> None:
    """Above 1: faster than peft."""
    for row in rows.values():
        for key in ("wall_ms", "replayed_ms"):
            if key in row and key in rows[REFERENCE]:
                row[f"over_peft_{key}"] = rows[REFERENCE][key] / row[key]
