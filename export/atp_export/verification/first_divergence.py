"""Where an exported graph first leaves its model: hidden states compared layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from atp_export.runtime.generation import Floats
from atp_export.runtime.session import Session, load


@torch.no_grad()
def first_divergence(
    folder: Path, model: Any, ids: Sequence[int], *, provider: str, bound: float
) -> str:
    """Name the first part whose output differs by more than `bound` of the hidden states' spread.

    The embedding, layer i (counted from 0), the final norm, or else the vocabulary head.
    """
    device = next(model.parameters()).device
    expected = model(torch.tensor([list(ids)], device=device), output_hidden_states=True)
    theirs = [h[0].float().cpu().numpy() for h in expected.hidden_states]
    for name, (output, index) in _hidden_names(folder, len(theirs) - 1).items():
        ours = _run(folder, output, ids, provider)
        spread = float(theirs[index].std())
        error = float(np.sqrt(np.mean((ours - theirs[index]) ** 2))) / spread
        if not error <= bound:
            return f"{name} is the first to differ, by {error:.2e} of its output's spread"
    return "every layer agrees: it is the vocabulary head that differs"


def _hidden_names(folder: Path, layers: int) -> dict[str, tuple[str, int]]:
    """Part -> (the graph's name of its output, which of transformers' hidden states it is)."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    present = {name for node in graph.node for name in node.output}
    names = {"the embedding": ("embed", 0)}
    for i in range(1, layers):
        sums = [f"model.layers.{i}.{norm}.sum" for norm in ("input_norm", "mlp_norm")]
        found = next((name for name in sums if name in present), None)
        # A layer without attention and MLP has no sum of its own: the next one's covers it.
        if found is not None:
            names[f"layer {i - 1}"] = (found, i)
    names[f"layer {layers - 1} or the final norm"] = ("final_norm", layers)
    return names


def _run(folder: Path, output: str, ids: Sequence[int], provider: str) -> Floats:
    """One hidden state [S, H] of the exported graph, asked for as a further output."""
    session = Session(folder, provider=provider)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info(output))
    whole = load(path, model.SerializeToString(), session.provider)
    feed: dict[str, Any] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    for name, i in session.past.items():
        feed[name] = np.zeros((1, i.shape[1], 0, i.shape[3]), session.cache_type)
    known = {i.name for i in whole.get_inputs()}
    (hidden,) = whole.run([output], {k: v for k, v in feed.items() if k in known})
    return hidden[0].astype(np.float32)
