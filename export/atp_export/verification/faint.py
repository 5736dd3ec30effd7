"""The fp32 form with a residual stream so faint that the epsilon of every norm counts.

A norm divides by the root of mean square + epsilon. Where hidden states are of order 1, an epsilon
ten times too large moves logits by no more than fp32's own rounding does; where their mean square
is of epsilon's order it moves them by half. So the matrices whose outputs a norm reads are made
smaller, in the file and in the model alike, and both are asked again.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from atp_edge.model.families import ModelShape
from atp_export.verification.embedding import refer
from atp_export.verification.places import EMBEDDING, HEAD, Place
from atp_export.verification.tensors import Tensors
from atp_export.verification.widen import Widened

_DATA = "faint.data"


@dataclass(frozen=True, kw_only=True)
class Faint:
    """What a parameter is multiplied by; of a norm whose weight is added to `offset`, the sum."""

    factor: float
    offset: float = 0.0

    def of(self, values: Any) -> Any:
        """A tensor's (or an array's) values."""
        if not self.offset:
            return values * self.factor
        return (values + self.offset) * self.factor - self.offset


def faint_factors(
    state: Mapping[str, Tensor], places: Mapping[str, Place], shape: ModelShape
) -> dict[str, Faint]:
    """How parameters are changed, of those whose outputs a norm reads."""
    faint = math.sqrt(shape.norm_eps)
    norms, readers = shape.layout.norms, ["o_proj", "down_proj"]
    if shape.layout.head_norms is not None:
        readers += ["q_proj", "k_proj"]
    into_norms = rf"\.(?:{'|'.join(readers)})\.(?:weight|bias)$"
    found = {name: Faint(factor=faint) for name in state if re.search(into_norms, name)}
    for norm in filter(None, (norms.after_attention, norms.after_mlp)):
        # Else they would make the stream as strong again.
        change = Faint(factor=faint, offset=shape.layout.norm_offset)
        found |= {name: change for name in state if name.endswith(f".{norm}.weight")}
    spread = float(state[EMBEDDING].square().mean().sqrt()) * abs(shape.scales.embedding)
    found[EMBEDDING] = Faint(factor=faint / max(spread, faint))
    if EMBEDDING in places and HEAD in places and places[EMBEDDING].tensor == places[HEAD].tensor:
        found[HEAD] = found[EMBEDDING]
    return found


def faded(state: Mapping[str, Tensor], factors: Mapping[str, Faint]) -> dict[str, Tensor]:
    """The state with these parameters changed; what the head shares with the embedding, once."""
    found = {name: factors[name].of(x) if name in factors else x for name, x in state.items()
             if name != HEAD}  # fmt: skip
    if HEAD in state:
        found[HEAD] = found[EMBEDDING] if HEAD in factors else state[HEAD]
    return found


def make_faint(widened: Widened, places: Mapping[str, Place], factors: Mapping[str, Faint]) -> None:
    """Write the fp32 form's file anew with its tensors multiplied, and these beside the others."""
    path = widened.folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.CopyFrom(widened.graph)
    tensors = Tensors(widened.folder, widened.graph)
    parts: dict[str, list[tuple[Place, Faint]]] = defaultdict(list)
    # What the head shares with the embedding is multiplied there.
    for name in factors.keys() & places.keys() - {HEAD}:
        parts[places[name].tensor].append((places[name], factors[name]))
    with (widened.folder / _DATA).open("wb") as file:
        for proto in model.graph.initializer:
            if proto.name in parts:
                whole = np.array(tensors(proto.name))
                for place, change in parts[proto.name]:
                    part = place.of(whole)
                    part[...] = change.of(torch.from_numpy(part)).numpy()
                refer(proto, _DATA, file.tell(), whole.nbytes)
                file.write(whole.data)
    path.write_bytes(model.SerializeToString())
