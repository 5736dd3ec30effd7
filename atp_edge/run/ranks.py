"""The processes of one run on several devices, and what they tell each other.

`accelerate launch` or torchrun starts them; accelerate makes the group, torch's collectives do the
rest. Every rank holds the whole model and reads `rank::size` of a step's blocks. What is trained is
small, so its gradients are added up here (why not by DDP: docs/several-devices.md). Rank 0 alone
writes; files lie where all ranks see them. Launched alone, functions return what they were given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as group


def join() -> None:
    """Meet the other processes of the launch, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not group.is_initialized():
        from accelerate import PartialState

        PartialState()


def leave() -> None:
    """Part from the others: what comes after is this process's alone."""
    if group.is_initialized():
        from accelerate.state import AcceleratorState, PartialState

        group.destroy_process_group()
        AcceleratorState._reset_state()
        PartialState._reset_state()
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)


def size() -> int:
    return group.get_world_size() if group.is_initialized() else 1


def rank() -> int:
    return group.get_rank() if group.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def shared(rows: Tensor) -> Tensor:
    """This rank's rows of a batch [N, ...], of which only sums up to a factor are wanted: where
    there are fewer rows than ranks, every rank reads all."""
    return rows[rank() :: size()] if len(rows) >= size() else rows


def wait() -> None:
    """Until all ranks are here."""
    if size() > 1:
        group.barrier()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Set every tensor to its sum over the ranks, in one collective for all of a type."""
    if size() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_type.values():
        flat = torch.cat([tensor.detach().flatten() for tensor in alike])
        group.all_reduce(flat)
        with torch.no_grad():
            for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                tensor.copy_(part.view_as(tensor))


def take_from_main(masks: Iterable[Tensor]) -> None:
    """Set bool masks to those of rank 0."""
    if size() == 1:
        return
    for mask in masks:
        sent = mask.to(torch.uint8)
        group.broadcast(sent, src=0)
        mask.copy_(sent.bool())


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    held = [value]
    group.broadcast_object_list(held, src=0)
    return held[0]


def of_all(value: Any) -> list[Any]:
    """Every rank's value, in their order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    group.all_gather_object(values, value)
    return values


def check_same(values: dict[str, Any]) -> None:
    """Raise ValueError unless every rank has these values, by name."""
    first, *others = of_all(values)
    for other, theirs in enumerate(others, 1):
        for name, mine in first.items():
            if theirs.get(name) != mine:
                raise ValueError(
                    f"{name}: rank 0 has {mine}, rank {other} has {theirs.get(name)}; expected the "
                    "same on all. Start the ranks with the same installation, files and settings"
                )
