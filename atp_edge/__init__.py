"""atp-edge: from a Hugging Face decoder and domain text to a slim model shipped as ONNX.

Importing the package lets `AutoModelForCausalLM` load checkpoints of per-layer widths.
"""

from types import ModuleType

from wrapt import when_imported


# Once transformers' own registry is there and not before: importing it takes seconds, and the
# command line answers without it.
@when_imported("transformers.models.auto.modeling_auto")
def _register(_: ModuleType) -> None:
    from atp_edge.modeling_per_layer import register

    register()
