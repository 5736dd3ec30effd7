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

import numpy as np
import onnx
from torch import Tensor

from atp_export.verification.embedding import refer
from atp_export.verification.places import Place
from atp_export.verification.tensors import Tensors
from atp_export.verification.widen import Widened

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DATA = "faint.data"


def faint_factors(
    state: Mapping[str, Tensor], places: Mapping[str, Place], epsilon: float
) -> dict[str, float]:
    """What parameters are multiplied by, of those whose outputs a norm reads."""
    into_norms = r"\.(?:o_proj|down_proj)\.(?:weight|bias)$"
    if any(name.endswith("q_norm.weight") for name in state):
        into_norms = r"\.(?:o_proj|down_proj|q_proj|k_proj)\.(?:weight|bias)$"
    faint = math.sqrt(epsilon)
    found = {name: faint for name in state if re.search(into_norms, name)}
    spread = float(state[EMBEDDING].square().mean().sqrt())
    found[EMBEDDING] = faint / max(spread, faint)
    if EMBEDDING in places and HEAD in places and places[EMBEDDING].tensor == places[HEAD].tensor:
        found[HEAD] = found[EMBEDDING]
    return found


def make_faint(widened: Widened, places: Mapping[str, Place], factors: Mapping[str, float]) -> None:
    """Write the fp32 form's file anew with its tensors multiplied, and these beside the others."""
    path = widened.folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.CopyFrom(widened.graph)
    tensors = Tensors(widened.folder, widened.graph)
    parts: dict[str, list[tuple[Place, float]]] = defaultdict(list)
    # What the head shares with the embedding is multiplied there.
    for name in factors.keys() & places.keys() - {HEAD}:
        parts[places[name].tensor].append((places[name], factors[name]))
    with (widened.folder / _DATA).open("wb") as file:
        for proto in model.graph.initializer:
            if proto.name in parts:
                whole = np.array(tensors(proto.name))
                for place, factor in parts[proto.name]:
                    part = place.of(whole)
                    part *= np.float32(factor)
                refer(proto, _DATA, file.tell(), whole.nbytes)
                file.write(whole.data)
    path.write_bytes(model.SerializeToString())
