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
    """Name the first part whose output differs by more than `bound` of its spread from that of a
    PyTorch model: the embedding, layer i (counted from 0), the final norm, the vocabulary head."""
    device = next(model.parameters()).device
    expected = model(torch.tensor([list(ids)], device=device), output_hidden_states=True)
    every = (*expected.hidden_states, expected.logits)
    theirs = [states[0].float().cpu().numpy() for states in every]
    names = _output_names(folder, len(expected.hidden_states) - 1)
    ours = _outputs(folder, [output for output, _ in names.values()], ids, provider)
    parts = {part: (ours[output], theirs[index]) for part, (output, index) in names.items()}
    return _first(parts, bound)


def first_divergence_of_graphs(
    folder: Path, other: Path, layers: int, ids: Sequence[int], *, provider: str, bound: float
) -> str:
    """The same against another graph of the same model, run in fp32 on the CPU."""
    names = _output_names(folder, layers)
    outputs = [output for output, _ in names.values()]
    ours = _outputs(folder, outputs, ids, provider)
    theirs = _outputs(other, outputs, ids, "CPUExecutionProvider")
    parts = {part: (ours[output], theirs[output]) for part, (output, _) in names.items()}
    return _first(parts, bound)


def _first(parts: Mapping[str, tuple[Floats, Floats]], bound: float) -> str:
    for part, (ours, theirs) in parts.items():
        error = float(np.sqrt(np.mean((ours - theirs) ** 2))) / float(theirs.std())
        if not error <= bound:
            return f"{part} is the first to differ, by {error:.2e} of its output's spread"
    tokens = len(next(iter(parts.values()))[0])
    return f"of {tokens} tokens read at once no part differs"


def _output_names(folder: Path, layers: int) -> dict[str, tuple[str, int]]:
    """Part -> (the graph's name of its output, which of transformers' hidden states it is; after
    the last of them, the logits)."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    present = {name for node in graph.node for name in node.output}
    scaled = "embed.scaled" in present
    names = {"the embedding": ("embed.scaled" if scaled else "embed", 0)}
    for i in range(1, layers):
        sums = [f"model.layers.{i}.{norm}.sum" for norm in ("input_norm", "mlp_norm")]
        found = next((name for name in sums if name in present), None)
        # A layer without attention and MLP has no sum of its own: the next one's covers it.
        if found is not None:
            names[f"layer {i - 1}"] = (found, i)
    names[f"layer {layers - 1} or the final norm"] = ("final_norm", layers)
    names["the vocabulary head"] = ("logits", layers + 1)
    return names


def _outputs(
    folder: Path, outputs: Sequence[str], ids: Sequence[int], provider: str
) -> dict[str, Floats]:
    """Values [S, ..] of the exported graph by name.

    What is no output yet is asked for as a further one. The graph's own stay: a cache that is no
    output shares its buffer with what it grew from, and ONNX Runtime then finds it too small.
    """
    session = Session(folder, provider=provider)
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    own = {value.name for value in model.graph.output}
    further = [name for name in outputs if name not in own]
    model.graph.output.extend(map(helper.make_empty_tensor_value_info, further))
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
