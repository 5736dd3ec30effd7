"""Weights of a checkpoint written and read one tensor at a time: no model is held whole.

A safetensors file begins with a header of names, types, shapes and places. All of it follows from a
model without memory for its weights, so that the header is written first, and every tensor after it
as it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from atp_edge.model.loading import INDEX, STORED_TYPES, read_tensor

Read = Callable[[str], Tensor]
"""A tensor by its name, made or read when it is asked for."""
MAX_SHARD = "50GB"
"""Of one file of a checkpoint: transformers' own default (`save_pretrained`, version 5)."""
_WEIGHTS = "model{suffix}.safetensors"
_TYPE_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}
_ALIGNMENT = 8
_HEAD, _EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"


def write_tensors(path: Path, described: Mapping[str, Tensor], read: Read) -> None:
    """Write a safetensors file. described: by name, tensors of the shapes and types to write (on
    the meta device, say); read gives their values. Raises ValueError for other shapes or types."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in described.items():
        begin, end = end, end + tensor.nbytes
        kind = _TYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in described.items():
            made = read(name).detach()
            if made.shape != wanted.shape or made.dtype != wanted.dtype:
                raise ValueError(
                    f"{name} is {list(made.shape)} {made.dtype}, and {path} was to hold "
                    f"{list(wanted.shape)} {wanted.dtype}"
                )
            flat = made.cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


def write_weights(
    folder: Path, described: Mapping[str, Tensor], read: Read, *, max_shard: int | str = MAX_SHARD
) -> None:
    """Write the weights of a checkpoint, in as many files as transformers would, with its index."""
    split = split_torch_state_dict_into_shards(
        dict(described), filename_pattern=_WEIGHTS, max_shard_size=max_shard
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: described[name] for name in names}, read)
    if split.is_sharded:
        index = {
            "metadata": {
                "total_parameters": sum(x.numel() for x in described.values()),
                **split.metadata,
            },
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def reader_of(files: Mapping[str, Path]) -> Read:
    """Tensors by name from their files, whatever a checkpoint puts before `layers` in its names."""
    by_ending = {name.removeprefix("model."): name for name in files}

    def read(name: str) -> Tensor:
        ending = name.removeprefix("model.")
        if ending == _HEAD and ending not in by_ending:
            ending = _EMBEDDINGS  # tied
        if ending not in by_ending:
            raise ValueError(f"the checkpoint holds no {name}: expected a whole one")
        stored = by_ending[ending]
        return read_tensor(stored, files[stored])

    return read


def without_weights() -> AbstractContextManager[None]:
    """Models that are built inside have no memory for their parameters, only for their buffers."""
    empty: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return empty


def fill(model: nn.Module, names: Collection[str], read: Read) -> None:
    """Give a model's empty parameters their values, one at a time: `read` with their names."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        put(model.get_submodule(path), leaf, read(name))


def put(module: nn.Module, leaf: str, value: Tensor) -> None:
    """A module's parameter with another tensor in it; trained or not as it was."""
    trained = module.get_parameter(leaf).requires_grad
    # One of bitsandbytes' is a parameter with levels and scales, which a new one would lose.
    own = isinstance(value, nn.Parameter)
    made = value.requires_grad_(trained) if own else nn.Parameter(value, requires_grad=trained)
    setattr(module, leaf, made)


def streamed(model: nn.Module, read: Read, device: torch.device) -> nn.Module:
    """A model without weights whose every layer holds its own only while it computes (forward
    passes alone: a backward pass would need them again)."""
    for path, module in model.named_modules():
        leaves = [name for name, _ in module.named_parameters(recurse=False)]
        if leaves:
            module.register_forward_pre_hook(partial(_take_weights, path, leaves, read, device))
            module.register_forward_hook(partial(_drop_weights, leaves))
    return model


def _take_weights(
    path: str, leaves: list[str], read: Read, device: torch.device, module: nn.Module, _: Any
) -> None:
    for leaf in leaves:
        wanted = module.get_parameter(leaf).dtype
        put(module, leaf, read(f"{path}.{leaf}").to(device, wanted, copy=True))


def _drop_weights(leaves: list[str], module: nn.Module, *_: Any) -> None:
    for leaf in leaves:
        put(module, leaf, module.get_parameter(leaf).detach().to("meta"))


def computing_in_fp32(model: nn.Module) -> nn.Module:
    """A model whose every layer has its own weights in fp32 only while it computes (forward passes
    alone); between, they lie in the type that they are held in."""
    for module in model.modules():
        held = dict(module.named_parameters(recurse=False))
        if held:
            module.register_forward_pre_hook(partial(_put_all, held, torch.float32))
            module.register_forward_hook(partial(_put_all, held, None))
    return model


def _put_all(
    held: Mapping[str, nn.Parameter], dtype: torch.dtype | None, module: nn.Module, *_: Any
) -> None:
    for leaf, own in held.items():  # The very parameter afterwards: it may be another layer's, too.
        put(module, leaf, own.detach().to(dtype) if dtype else own)


def drop(module: nn.Module) -> None:
    """Let go of a module's parameters; `fill` gives them back."""
    for path, part in module.named_modules():
        _drop_weights([name for name, _ in part.named_parameters(recurse=False)], part, path)
