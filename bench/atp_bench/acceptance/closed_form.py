"""The match to the teacher and the repair, of one layer at real size: seconds and peak."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from atp_bench.acceptance.models import lora_on, random_blocks, random_llama, random_masks
from atp_bench.acceptance.sizes import Sizes
from atp_bench.acceptance.timing import clocked_ms, free
from atp_edge.masking.apply import set_decision
from atp_edge.reconstruction.repair import Repair
from atp_edge.reconstruction.teacher_match import match_teacher

_VOCABULARY = 512
_BLOCKS = {"match": 64, "repair": 16}
"""The defaults of recovery.approach_blocks and recovery.reconstruct_blocks."""


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Of one layer, by the blocks that a run reads."""
    config = sizes.config(1, vocabulary=_VOCABULARY)
    base = random_llama(config, sizes.device, sizes.dtype)
    teacher = copy.deepcopy(base)
    model = lora_on(base, sizes.rank)
    masks = random_masks(model, sizes, fixed=True)
    found: dict[str, Any] = {}

    def match() -> None:
        set_decision(model, masks, "whole", skip=False)
        blocks = random_blocks(sizes, vocabulary=_VOCABULARY, count=_count("match", sizes))
        match_teacher(model, teacher, blocks)

    def repair() -> None:
        blocks = random_blocks(sizes, vocabulary=_VOCABULARY, count=_count("repair", sizes))
        Repair(model, masks, blocks)

    for name, work in {"repair": repair, "match": match}.items():
        found[name] = {"blocks": _count(name, sizes)} | _costs(work, sizes)
        keep(found)
        free()
    weight = model.get_base_model().model.layers[0].mlp.down_proj.get_base_layer().weight
    return found | {"finite": bool(torch.isfinite(weight).all())}


def _count(name: str, sizes: Sizes) -> int:
    return 2 if sizes.toy else _BLOCKS[name]


def _costs(work: Callable[[], None], sizes: Sizes) -> dict[str, float]:
    """Once: the weights are moved by it."""
    held = 0
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with torch.autocast(sizes.device, dtype=sizes.dtype):
        ms = clocked_ms(work)
    if sizes.device != "cuda":
        return {"wall_ms": ms}
    return {"wall_ms": ms, "peak_bytes_above_before": torch.cuda.max_memory_allocated() - held}
