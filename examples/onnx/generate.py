"""Greedy generation with an exported folder on plain ONNX Runtime: numpy and onnxruntime alone.

python generate.py FOLDER NEW_TOKENS ID ID ID ...    prints one JSON line: {"tokens": [...]}

Where the gate's domain.npz lies in the folder or beside it, the line also says whether the prompt
lies outside the model's domain: {"tokens": [...], "outside": true}.

Works with every flavour. The cache grows here, for clarity; atp_export.runtime keeps it in place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def generate(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """New tokens after a prompt of token ids."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {i.name: i for i in session.get_inputs()}
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache: dict[str, Any] = {
        name: np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type])
        for name, i in inputs.items()
        if name.startswith("past_key_values.")
    }
    presents = [name.replace("past_key_values", "present") for name in cache]
    step, length, tokens = np.array([prompt], np.int64), 0, []
    while len(tokens) < new_tokens:
        length += step.shape[1]
        feed = cache | {"input_ids": step, "attention_mask": np.ones((1, length), np.int64)}
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(length - step.shape[1], length)[None]
        logits, *new = session.run(["logits", *presents], feed)
        cache = dict(zip(cache, new, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        step = np.array([tokens[-1:]], np.int64)
    return tokens


def outside(folder: Path, prompt: list[int]) -> bool | None:
    """Whether a prompt lies outside the domain (docs/gate.md); None where that cannot be told."""
    places = [folder / "domain.npz", folder.parent / "domain.npz"]
    if (folder.parent / "config.toml").is_file() and folder.name != "onnx":
        places.pop()  # In a run's folder it is of the run's own onnx/ alone.
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        return None
    with np.load(path, allow_pickle=False) as held:
        bits, lengths, thresholds = held["bits"], held["lengths"], held["thresholds"]
    if len(prompt) < lengths.min(initial=len(prompt) + 1):
        return None
    tokens = np.array(prompt, np.uint64)
    mixed = tokens[:-1] * np.uint64(0x9E3779B1) + tokens[1:] * np.uint64(0x85EBCA77)
    pairs = (mixed ^ (mixed >> np.uint64(17))) % np.uint64(8 * len(bits))
    known = bits[pairs >> np.uint64(3)] >> (pairs & np.uint64(7)).astype(np.uint8) & 1
    return bool(1 - known.mean() > thresholds[lengths <= len(prompt)][-1])


if __name__ == "__main__":
    folder, new_tokens, *prompt = sys.argv[1:]
    ids = [int(token) for token in prompt]
    answer: dict[str, Any] = {"tokens": generate(Path(folder), ids, int(new_tokens))}
    foreign = outside(Path(folder), ids)
    sys.stdout.write(json.dumps(answer | ({} if foreign is None else {"outside": foreign})) + "\n")
