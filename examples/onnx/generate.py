"""Greedy generation with an exported folder on plain ONNX Runtime: numpy and onnxruntime alone.

python generate.py FOLDER NEW_TOKENS ID ID ID ...    prints one JSON line: {"tokens": [...]}

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


if __name__ == "__main__":
    folder, new_tokens, *prompt = sys.argv[1:]
    tokens = generate(Path(folder), [int(token) for token in prompt], int(new_tokens))
    sys.stdout.write(json.dumps({"tokens": tokens}) + "\n")
