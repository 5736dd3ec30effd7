"""The weights of a model with its LoRA folded in, one at a time, by peft's own merge."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from atp_edge.model.stream import Read

_PREFIX = "base_model.model."


class MergedWeights:
    """Call it with a parameter's name of the model without LoRA: its value in fp32.

    model: with its LoRA, on the meta device. read: tensors by their names in `model`. merged: off,
    the base weights are as they are. Raises ValueError when a merged weight is not finite.
    """

    def __init__(self, model: PeftModel, read: Read, *, merged: bool = True) -> None:
        self.model, self.read, self.merged = model, read, merged

    def __call__(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(f"{_PREFIX}{path}")
        if not isinstance(module, BaseTunerLayer):
            return self.read(_PREFIX + name).float()
        if leaf != "weight" or not self.merged:
            return self.read(f"{_PREFIX}{path}.base_layer.{leaf}").float()
        part = copy.deepcopy(module).to_empty(device="cpu")
        for key, parameter in part.named_parameters():
            parameter.data = self.read(f"{_PREFIX}{path}.{key}").float().cpu()
        part.merge(safe_merge=True)
        weight: Tensor = part.get_base_layer().weight.detach()
        return weight


def base_and_adapter(base: Read, adapter: Mapping[str, Tensor]) -> Read:
    """Tensors by their names in a model with LoRA: the adapter's own, and a checkpoint's."""

    def read(name: str) -> Tensor:
        if name in adapter:
            return adapter[name].detach()
        return base(name.removeprefix(_PREFIX).replace(".base_layer.", "."))

    return read
