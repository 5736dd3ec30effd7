"""Where an exported graph first leaves what it should compute: hidden states, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Name the first part whose output differs by more than `bound` of the hidden states' spread
    from that of a PyTorch model.

    The embedding, layer i (counted from 0), the final norm, or else the vocabulary head.
    """
    device = next(model.parameters()).device
    expected = model(torch.tensor([list(ids)], device=device), output_hidden_states=True)
    theirs = [h[0].float().cpu().numpy() for h in expected.hidden_states]
    names = _hidden_names(folder, len(theirs) - 1)
    ours = _hidden_states(folder, [output for output, _ in names.values()], ids, provider)
    parts = {part: (ours[output], theirs[index]) for part, (output, index) in names.items()}
    return _first(parts, bound)


def first_divergence_of_graphs(
    folder: Path, other: Path, layers: int, ids: Sequence[int], *, provider: str, bound: float
) -> str:
    """The same against another graph of the same model, run in fp32 on the CPU."""
    names = _hidden_names(folder, layers)
    outputs = [output for output, _ in names.values()]
    ours = _hidden_states(folder, outputs, ids, provider)
    theirs = _hidden_states(other, outputs, ids, "CPUExecutionProvider")
    parts = {part: (ours[output], theirs[output]) for part, (output, _) in names.items()}
    return _first(parts, bound)


def _first(parts: Mapping[str, tuple[Floats, Floats]], bound: float) -> str:
    for part, (ours, theirs) in parts.items():
        error = float(np.sqrt(np.mean((ours - theirs) ** 2))) / float(theirs.std())
        if not error <= bound:
            return f"{part} is the first to differ, by {error:.2e} of its output's spread"
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


def _hidden_states(
    folder: Path, outputs: Sequence[str], ids: Sequence[int], provider: str
) -> dict[str, Floats]:
    """Hidden states [S, H] of the exported graph by name, asked for as further outputs.

    The graph's own stay outputs: a cache that is none shares its buffer with what it grew from,
    and ONNX Runtime then finds it too small.
    """
    session = Session(folder, provider=provider)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    whole = load(path, model.SerializeToString(), session.provider)
    feed: dict[str, Any] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }
    for name, i in session.past.items():
        feed[name] = np.zeros((1, i.shape[1], 0, i.shape[3]), session.cache_type)
    known = {i.name for i in whole.get_inputs()}
    found = whole.run(list(outputs), {k: v for k, v in feed.items() if k in known})
    return {name: x[0].astype(np.float32) for name, x in zip(outputs, found, strict=True)}
