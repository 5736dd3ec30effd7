"""The tensors of an exported file against the model's own, and the model that holds the file's.

A lower precision is judged by a model with the same rounded weights, so that rounding hides no
fault of the graph. That the weights are the model's own, rounded, is judged here: otherwise a
zeroed matrix would be its own reference.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from atp_edge.model.families import ModelShape, Norms, said_shape
from atp_edge.model.storage import rotary_names
from atp_export.quantization.gptq import MOST_MOVED
from atp_export.verification.blocks import Quantized
from atp_export.verification.checks import Check, at_most, none_of
from atp_export.verification.places import EMBEDDING, HEAD, SCALE, Place, places_of
from atp_export.verification.tensors import Tensors
from atp_export.verification.widen import Widened

# Rounded to the nearest level a weight moves by half a step. The symmetric quantizer has one level
# less on one side, so that the last one there may stand for a weight one step further out; k-quant
# cuts off what its search finds dear (1.34 steps at most, SmolLM2-135M's embeddings).
NEAREST_STEPS = 0.5 + 1e-3
STEPS_AT_THE_END = {"nearest": 1 + 1e-3, "k-quant": 2.0}
# gptq moves a weight by what its neighbours' rounding asks for: up to 9 steps, and a block by up to
# 0.95 of its length (SmolLM2-135M, int4); a whole output's row by MOST_MOVED at most. A row that is
# zeroed moves by 1, one that is another's by 1.4.
_ROWS = 8192
_TYPES = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
_IN_A_LAYER = re.compile(r"(model\.layers\.\d+)\.(\w+)\.")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the file holds of a model.

    state: every parameter, from the file where it is the model's own, rounded; where it is not, the
    model's, so that logits show the difference. tables, scales: likewise (see Reference).
    """

    checks: tuple[Check, ...]
    places: Mapping[str, Place]
    state: Mapping[str, Tensor]
    tables: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[int, float]


@torch.no_grad()
def stored_in(widened: Widened, model: Any) -> Stored:
    """Compare every tensor that a model's parameters became, one at a time."""
    own = dict(model.named_parameters(remove_duplicate=False))
    tensors = Tensors(widened.folder, widened.graph)
    places = places_of(widened, own)
    state: dict[str, Tensor] = dict(own)
    differing: list[str] = []
    rounded: list[tuple[float, str]] = [(0.0, "no weight is rounded to levels")]
    for name, place, held in _parts(places, tensors):
        # A projection without a bias, packed with one that has some, has zeros there.
        expected = own[name].cpu() if name in own else torch.zeros(held.shape)
        if held.shape != expected.shape:
            differing.append(f"{name} is {list(held.shape)}, not {list(expected.shape)}")
            continue
        levels = widened.quantized.get(place.tensor)
        if levels is None:
            kind = _type(widened, place.tensor)
            fault = _difference(held, expected, name, kind)
            differing += [fault] if fault else []
            # What is the model's own to the bit is not held a second time.
            right = fault is None and kind != torch.float32
        else:
            moved = _moved(held, expected, levels().rows(place.rows), widened.quantizer)
            rounded.append((moved, f"{name} lies {moved:.2f} times as far as its levels allow"))
            right = moved <= 1
        if right and name in own:
            state[name] = held
    # A graph that gathers levels has the head's table apart, with the same values.
    if own.get(HEAD) is own[EMBEDDING] and torch.equal(state[HEAD], state[EMBEDDING]):
        state[HEAD] = state[EMBEDDING]
    worst = max(rounded, key=lambda pair: np.nan_to_num(pair[0], nan=np.inf))
    shape = said_shape(model.config)
    tables, wrong = _tables(widened, tensors, model, shape)
    scales, wrong_scales = _scales(widened, tensors, model)
    norms = shape.layout.norms
    missing = [name for name in own if name not in places and not _silent(name, own, norms)]
    return Stored(
        checks=(
            none_of("finite", list(widened.not_finite), "tensor that is not finite"),
            none_of("places", missing, "parameter that the file does not hold"),
            none_of("weights", differing + wrong_scales, "tensor that is not the model's"),
            at_most("rounding", worst[0], 1.0, worst[1]),
            none_of("rotary", wrong, "rotary table that is not the model's"),
        ),
        places=places,
        state=state,
        tables=tables,
        scales=scales,
    )


def _parts(places: Mapping[str, Place], tensors: Tensors) -> Iterator[tuple[str, Place, Tensor]]:
    """What lies at every place. A tensor is mapped once for all parameters that lie in it."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, place in places.items():
        names[place.tensor].append(name)
    for tensor, within in names.items():
        whole = torch.from_numpy(tensors(tensor))
        for name in within:
            yield name, places[name], places[name].of(whole)


def _type(widened: Widened, tensor: str) -> torch.dtype:
    """The type that the exported file has a tensor in."""
    kind = widened.stored.kind(tensor) if tensor in widened.stored else TensorProto.FLOAT
    return _TYPES.get(kind, torch.float32)


def _difference(held: Tensor, own: Tensor, name: str, dtype: torch.dtype) -> str | None:
    """What is wrong with a tensor that must be the model's own, once it is of the file's type."""
    off = sum(
        int((ours != theirs.to(dtype).float()).sum())
        for ours, theirs in zip(held.split(_ROWS), own.split(_ROWS), strict=True)
    )
    return f"{name} differs in {off} of {own.numel()} values" if off else None


def _moved(held: Tensor, own: Tensor, levels: Quantized, quantizer: str) -> float:
    """How far levels lie from the weights they stand for, over what their quantizer allows."""
    worst = 0.0
    levels = replace(levels, columns=own.shape[1])
    for start in range(0, len(own), _ROWS):
        part = slice(start, start + _ROWS)
        weights = own[part].float().numpy()
        moved = held[part].numpy() - weights
        if quantizer == "gptq":
            lengths = np.linalg.norm(weights, axis=1)
            shares = np.linalg.norm(moved, axis=1) / np.where(lengths > 0, lengths, 1e-12)
            worst = np.maximum(worst, shares.max() / (MOST_MOVED[levels.bits] * (1 + 1e-3)))
        else:
            some = levels.rows(part)
            at_end = STEPS_AT_THE_END.get(quantizer, NEAREST_STEPS)
            allowed = np.where(some.at_the_end(), at_end, NEAREST_STEPS)
            worst = np.maximum(worst, (some.steps(moved) / allowed).max())
    return float(worst)


def _silent(name: str, own: Mapping[str, Tensor], norms: Norms) -> bool:
    """Whether a parameter may be left out of the file: it has no values, or its attention or MLP
    adds nothing, because what leaves it is multiplied by zeros."""
    if not own[name].numel():
        return True
    layer = _IN_A_LAYER.match(name)
    if layer is None:
        return False
    at, part = layer.groups()
    in_mlp = part in ("mlp", norms.before_mlp, norms.after_mlp)
    reader = f"{at}.mlp.down_proj" if in_mlp else f"{at}.self_attn.o_proj"
    halves = [own[f"{reader}.{half}"] for half in ("weight", "bias") if f"{reader}.{half}" in own]
    return not any(half.any() for half in halves)


def _tables(
    widened: Widened, tensors: Tensors, model: Any, shape: ModelShape
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """The rotary tables (cos, sin) of the file by name, or the model's where they differ, and what
    does."""
    device = next(model.parameters()).device
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    faults = []
    for rope in shape.ropes:
        names = rotary_names(rope)
        stored = [torch.from_numpy(tensors(name)) for name in names]
        positions = torch.arange(len(stored[0]))[None].to(device)
        of_type = {"layer_type": rope} if rope else {}
        both = model.model.rotary_emb(torch.zeros(1, device=device), positions, **of_type)
        own = [table[0, :, : table.shape[-1] // 2].cpu() for table in both]
        found = []
        for name, held, expected in zip(names, stored, own, strict=True):
            if held.shape != expected.shape:
                found.append(f"{name} is {list(held.shape)}, not {list(expected.shape)}")
            elif fault := _difference(held, expected, name, _type(widened, name)):
                found.append(fault)
        cos, sin = own if found else stored
        tables[rope] = cos, sin
        faults += found
    return tables, faults


def _scales(widened: Widened, tensors: Tensors, model: Any) -> tuple[dict[int, float], list[str]]:
    """The scales of attention scores by head_dim that the file holds, and those that are wrong."""
    attentions = [layer.self_attn for layer in model.model.layers]
    own_scales = {attention.head_dim: attention.scaling for attention in attentions}
    scales, faults = {}, []
    for name in (tensor for tensor in tensors.protos if tensor.startswith(SCALE)):
        size = int(name.removeprefix(SCALE))
        own = torch.tensor([own_scales.get(size, size**-0.5)])
        held = torch.from_numpy(tensors(name)).reshape(1)
        fault = _difference(held, own, name, _type(widened, name))
        if fault:
            faults.append(fault)
        else:
            scales[size] = float(held)
    return scales, faults
