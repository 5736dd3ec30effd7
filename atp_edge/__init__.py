"""atp-edge: from a Hugging Face decoder and domain text to a slim model shipped as ONNX.

Importing the package lets `AutoModelForCausalLM` load checkpoints of per-layer widths: as soon as
transformers' own registry is there and not before, for importing that takes seconds and the command
line answers without it.
"""

from importlib import import_module
from types import ModuleType

from wrapt import when_imported


@when_imported("transformers.models.auto.modeling_auto")
def _load(_: ModuleType) -> None:
    import_module("atp_edge.modeling_per_layer")


# Not in `_load`: whoever imports the module first is still in the middle of it there.
@when_imported("atp_edge.modeling_per_layer")
def _register(module: ModuleType) -> None:
    module.register()
