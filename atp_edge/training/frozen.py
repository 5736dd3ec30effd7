"""Models whose base weights no step changes: read one tensor at a time, in few bytes a weight.

Projections are kept in the type that autocast computes them in: half the memory of fp32, the same
outputs, and nothing cast at every step. nf4 (QLoRA, arXiv 2305.14314) keeps 4.1 bits a weight, by
bitsandbytes; what the closed-form steps move (o_proj, down_proj) stays in bf16 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from atp_kernels import dense_weight
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.config import Config
from atp_edge.masking.lora import MaskedLoraLinear
from atp_edge.model.families import PARTS, READER_OF
from atp_edge.model.hooks import removed_after
from atp_edge.model.loading import load_config, stored_type, tensor_files
from atp_edge.model.narrow import build_model
from atp_edge.model.sharded import fill_sharded
from atp_edge.model.stream import Read, fill, reader_of, without_weights
from atp_edge.run import ranks
from atp_edge.run.precision import AUTOCAST, precision_of
from atp_edge.training.setup import (
    load_dense,
    model_source,
    placed,
    shapes_alone,
    with_attention,
)

Kind = torch.dtype | str
"""What projections are kept in: a torch type, or `nf4`."""
NF4 = "nf4"


def load_base(config: Config, kind: Kind, accelerator: Accelerator) -> PreTrainedModel:
    """The run's dense model on the device as it came, frozen, its projections as `kind`."""
    device, shared = accelerator.device, shards(config)
    if kind == torch.float32 and not shared:
        return placed(load_dense(config), accelerator).requires_grad_(False)
    made = load_frozen(model_source(config.model), kind, device, shared=shared)
    return with_attention(made, device)


def shards(config: Config) -> bool:
    """Whether frozen weights are shared out: where it is asked for, and there is another rank."""
    return config.train.shard and ranks.size() > 1


def frozen_kind(config: Config) -> Kind:
    """What projections are kept in while LoRA alone is tuned: the dense baseline's, a teacher's."""
    if config.train.base_dtype == "nf4":
        return NF4
    if config.train.base_dtype == "fp32":
        return torch.float32
    return AUTOCAST.get(precision_of(config), torch.float32)


def pruned_kind(config: Config, stored: torch.dtype) -> Kind:
    """What they are kept in while a decision is learned, and in recovery: fp32 where they are
    tuned, else what loses nothing of their source, unless `train.base_dtype` says. stored: the type
    of the source's weights."""
    if config.recovery.retrain or config.train.base_dtype == "fp32":
        return torch.float32
    if config.train.base_dtype == "auto" and stored != torch.bfloat16:
        return torch.float32
    return frozen_kind(config)


def source_type(source: Path) -> torch.dtype:
    """The type of a checkpoint's weights; where there are none, what its configuration says."""
    if shapes_alone(source):
        return getattr(load_config(source), "dtype", None) or torch.float32
    return stored_type(source)


def check_base(config: Config) -> None:
    """Raises ValueError where the weights cannot be kept, or tuned, as the settings say."""
    kind = config.train.base_dtype
    if kind in ("bf16", "nf4") and config.recovery.retrain:
        raise ValueError(
            f"train.base_dtype = {kind!r} with recovery.retrain: kept weights are tuned in fp32, "
            "for a step is smaller than what bf16 can hold; take --no-recovery-retrain, or "
            "train.base_dtype = 'auto'"
        )
    if kind in ("bf16", "nf4") and config.train.precision not in ("auto", "bf16"):
        raise ValueError(
            f"train.base_dtype = {kind!r} with train.precision = {config.train.precision!r}: "
            "expected bf16, which such weights are computed in"
        )


def check_shards(config: Config) -> None:
    """Raises ValueError for settings that change weights which are shared out, or keep them."""
    if not config.train.shard:
        return
    wanted = {
        "recovery.retrain": (config.recovery.retrain, False),
        "recovery.reconstruct_blocks": (config.recovery.reconstruct_blocks, 0),
        "recovery.adapter": (config.recovery.adapter, "lora"),
        "decision.space": (config.decision.space, "groups"),
    }
    for name, (given, needed) in wanted.items():
        if given != needed:
            flag = name.replace(".", "-").replace("_", "-")
            take = f"--no-{flag}" if needed is False else f"--{flag} {needed}"
            raise ValueError(
                f"train.shard with {name} = {given!r}: weights that are shared out over ranks are "
                f"only read, but for the match to the teacher; take {take}"
            )
    if config.train.base_dtype == NF4 or config.train.checkpointing == "false":
        raise ValueError(
            "train.shard needs train.base_dtype other than 'nf4', which is packed by the matrix, "
            "and activation checkpointing, without which a step holds what it gathered; take "
            "--train-base-dtype bf16 --train-checkpointing true"
        )


def load_frozen(
    folder: Path, kind: Kind, device: torch.device, *, shared: bool = False
) -> PreTrainedModel:
    """A checkpoint on the device, its projections (but for nf4 those that are moved) as `kind`, all
    else in fp32. Never more than it and one tensor is held; shared: its share of it and one layer.

    Raises ValueError for a tensor that is missing, or not finite.
    """
    with without_weights():
        model = build_model(load_config(folder), torch.float32)
    if kind == NF4:
        _make_room_for_nf4(model)
    model.tie_weights()
    read = _finite(reader_of(tensor_files(folder)), folder)
    names = [name for name, _ in model.named_parameters()]
    filled = fill_sharded if shared else fill
    filled(model, names, lambda name: kept_as(kind, name, read(name), device))
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def kept_as(kind: Kind, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A weight as it is kept on the device."""
    head = name.startswith("lm_head")  # Autocast computes with it as with projections.
    if not (head or _is_projection(name)) or name.endswith("bias"):
        return value.to(device, torch.float32)
    if kind != NF4:
        assert isinstance(kind, torch.dtype)
        return value.to(device, kind)
    if head or _is_moved(name):
        return value.to(device, torch.bfloat16)
    from bitsandbytes.nn import Params4bit

    packed: Tensor = Params4bit(
        value.to(torch.bfloat16), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(device)
    return packed


def _make_room_for_nf4(model: nn.Module) -> None:
    """bitsandbytes' own layers in place of those that it quantizes."""
    from bitsandbytes.nn import Linear4bit

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _is_projection(path) and not _is_moved(path):
            parent, _, leaf = path.rpartition(".")
            with torch.device("meta"):
                made = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
            setattr(model.get_submodule(parent), leaf, made)


def _finite(read: Read, folder: Path) -> Read:
    def checked(name: str) -> Tensor:
        value = read(name)
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{folder}: {name} has values that are nan or infinite: the checkpoint is damaged; "
                "download or train it again"
            )
        return value

    return checked


def _is_projection(name: str) -> bool:
    return not set(PARTS).isdisjoint(name.split("."))


def _is_moved(name: str) -> bool:
    return not set(READER_OF.values()).isdisjoint(name.split("."))


@contextmanager
def in_fp32(model: PeftModel) -> Iterator[None]:
    """Outside of autocast: projections are widened to fp32 while they compute, one at a time."""
    hooks = []
    for module in model.modules():
        if isinstance(module, MaskedLoraLinear):
            hooks += _widening(module, module.get_base_layer())
    head = model.get_base_model().get_output_embeddings()
    hooks += _widening(head, head)
    with removed_after(hooks):
        yield


def _widening(module: nn.Module, layer: Any) -> list[Any]:
    if layer.weight.dtype == torch.float32:
        return []
    kept: list[Tensor] = []

    def widen(*_: Any) -> None:
        kept.append(layer.weight)
        layer.weight = nn.Parameter(dense_weight(layer.weight).float(), requires_grad=False)

    def restore(*_: Any) -> None:
        layer.weight = kept.pop()

    return [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
