"""atp-edge: from a Hugging Face decoder and domain text to a slim model shipped as ONNX.

Importing the package lets `AutoModelForCausalLM` load checkpoints of per-layer widths, from its
first call on: importing transformers takes seconds, and the command line answers without it.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import when_imported, wrap_function_wrapper


@cache
def _register() -> None:
    families = import_module("atp_edge.model.families").FAMILIES
    import_module("atp_edge.model.modeling_per_layer").register(families)


def _registered(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    _register()
    return wrapped(*args, **kwargs)


# Not registered here: whoever imports this module may be in the middle of the very classes that
# ours are made of, as transformers' own `modeling_layers` is.
@when_imported("transformers.models.auto.modeling_auto")
def _register_at_first_call(module: ModuleType) -> None:
    for name in ("from_pretrained", "from_config"):
        wrap_function_wrapper(module, f"AutoModelForCausalLM.{name}", _registered)
