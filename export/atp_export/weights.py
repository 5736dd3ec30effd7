"""Tensors of a Hugging Face checkpoint by name, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointWeights:
    """Call it with a tensor's name. Raises ValueError for one that is missing or truncated."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            places: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self.files = {name: folder / file for name, file in places.items()}
            return
        path = folder / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{folder} holds no model.safetensors: expected a checkpoint's folder")
        try:
            with safe_open(path, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(
                f"the checkpoint has no tensor {name}; it holds {len(self.files)} others: "
                "write it again with `atp-edge shrink`"
            )
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
