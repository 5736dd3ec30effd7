"""atp-edge: from a Hugging Face decoder and domain text to a slim model shipped as ONNX.

Importing the package lets `AutoModelForCausalLM` load checkpoints of per-layer widths, from its
first call on: importing transformers takes seconds, and the command line answers without it.
What is public is in `__all__` and comes from `atp_edge.api` when it is asked for.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import when_imported, wrap_function_wrapper

__all__ = [
    "Config",
    "DecisionLearner",
    "Generator",
    "Plan",
    "Run",
    "Sampling",
    "Verdict",
    "load",
    "narrow",
    "read_plan",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("atp_edge.api"), name)
    raise AttributeError(f"module 'atp_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


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
