"""Frozen weights shared out over the ranks of a run, by torch's own FSDP2 (`fully_shard`).

Of every decoder layer a rank holds its share of the frozen matrices. They are gathered while the
layer computes, forwards and backwards, and let go after it. What is trained (LoRA, the generator)
is small: it is on every rank, as norms and embeddings are, and its gradients are added up as
without shards (`atp_edge.run.ranks`). All ranks must go through a layer equally often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from atp_edge.model.stream import Read, fill
from atp_edge.run import ranks

_LAYER = re.compile(r".*\blayers\.\d+(?=\.)")


def fill_sharded(model: nn.Module, names: Collection[str], read: Read) -> None:
    """As `fill`, each decoder layer shared out as soon as it is whole: a rank holds its share and
    one layer. Called on every rank, with the same names in the same order."""
    layers = {name: found[0] for name in names if (found := _LAYER.match(name))}
    last = {layer: name for name, layer in layers.items()}
    for name in names:
        fill(model, [name], read)
        if last.get(layers.get(name, "")) == name:
            shard(model.get_submodule(layers[name]))


def shard(layer: nn.Module) -> None:
    """Share out a layer's frozen matrices over the ranks."""
    here = {p for name, p in layer.named_parameters() if p.ndim < 2 or "lora_" in name}
    device = next(layer.parameters()).device.type
    # Said: a layer is a root here, which by itself would keep what it gathered for its forward.
    fully_shard(layer, mesh=_mesh(device), reshard_after_forward=True, ignored_params=here)


@cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (ranks.size(),))


def is_sharded(model: nn.Module) -> bool:
    """Whether layers of the model are shared out."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def here_for_a_while(weight: Tensor) -> bool:
    """Whether a weight, looked at between steps, is a share: nothing made of it is to be kept."""
    return isinstance(weight, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a share, all of it; asked for on every rank at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def writes_stay(layer: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """What is written to the weights of these modules of a layer inside goes to the shares too, if
    it is shared out: what was gathered is let go. Every rank writes the same."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    layer.set_reshard_after_forward(False)
    yield
    written: list[Any] = [module.get_parameter("weight").detach().clone() for module in modules]
    layer.set_reshard_after_forward(True)
    layer.reshard()
    for module, values in zip(modules, written, strict=True):
        share: Any = module.get_parameter("weight")
        parts = values.chunk(ranks.size())
        if ranks.rank() < len(parts):
            with torch.no_grad():
                share.to_local().copy_(parts[ranks.rank()])


def keep_in_step(model: nn.Module, made: int, once_more: Callable[[], object]) -> None:
    """Where the model is shared out and other ranks made more passes through it: make as many."""
    if is_sharded(model):
        for _ in range(max(ranks.of_all(made)) - made):
            once_more()
