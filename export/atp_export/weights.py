"""Tensors of a Hugging Face checkpoint by name, read one at a time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from atp_edge.model.loading import read_tensor, tensor_files


class CheckpointWeights:
    """Call it with a tensor's name. Raises ValueError for one that is missing or truncated."""

    def __init__(self, folder: Path) -> None:
        self.files = tensor_files(folder)

    def __call__(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(
                f"the checkpoint has no tensor {name}; it holds {len(self.files)} others: "
                "write it again with `atp-edge shrink`"
            )
        return read_tensor(name, self.files[name])
