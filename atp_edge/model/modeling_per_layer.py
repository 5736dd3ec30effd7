"""Decoders whose layers have widths of their own, read from transformers' `per_layer_config`.

Besides transformers' own names a layer may have `rope_pairs`: its heads then hold these RoPE pairs
of the dense head alone, first halves before second ones, each turned by its own frequency.

`import atp_edge` registers these classes with `AutoModelForCausalLM`; a copy of this file also lies
beside the weights of every per-layer checkpoint, for those who load it with
`trust_remote_code=True`. It depends on transformers (>= 5.20) alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
    raise ImportError(
        "widths that differ by layer need transformers >= 5.20, and this is "
        f"{transformers.__version__}: update it, or run the model from its ONNX file"
    )


class _PerLayer(PreTrainedModel):
    """Builds decoder layer i from `config.per_layer_config[i]` instead of the global numbers."""

    def __init__(self, config: Any) -> None:
        shell = copy.copy(config)
        shell.per_layer_config = None
        shell.num_hidden_layers = 1
        super().__init__(shell)
        decoder = self._decoder
        layer_class = type(decoder.layers[0])
        config._attn_implementation = shell._attn_implementation
        self.config = decoder.config = config
        decoder.layers = nn.ModuleList(
            layer_class(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)
        )
        for layer in decoder.layers:
            _keep_rope_pairs(layer.self_attn)
        self._tell_layers()
        self.post_init()

    @property
    def _decoder(self) -> Any:
        """What holds the layers: the whole model, or the part of it below the vocabulary head."""
        return getattr(self, "model", self)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which does not know of the layers' own configurations."""
        super().set_attn_implementation(*args, **kwargs)
        self._tell_layers()

    def _tell_layers(self) -> None:
        for layer in self._decoder.layers:
            layer.self_attn.config._attn_implementation = self.config._attn_implementation

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; a configuration without per-layer widths gets its ordinary class."""
        config = (
            config
            if config is not None
            else AutoConfig.from_pretrained(path, trust_remote_code=False)
        )
        if not config.is_heterogeneous:
            return _ordinary(cls).from_pretrained(path, *args, config=config, **kwargs)
        return super().from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if not config.is_heterogeneous:
            return _ordinary(cls)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)


def _keep_rope_pairs(attention: Any) -> None:
    """Let an attention, built for fewer dimensions a head, turn those by their own frequencies."""
    pairs = getattr(attention.config, "rope_pairs", None)
    if pairs is not None:
        # No buffer: transformers loads onto models of the meta device and would not fill it.
        attention.rope_pairs = torch.tensor(pairs, device="cpu")
        attention.register_forward_pre_hook(_take_rope_pairs, with_kwargs=True)


def _take_rope_pairs(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """cos and sin [B, T, dense head_dim], their halves alike, of the kept pairs alone."""
    cos, sin = kwargs["position_embeddings"]
    pairs = attention.rope_pairs = attention.rope_pairs.to(cos.device)
    kept = tuple(x[..., pairs].repeat(1, 1, 2) for x in (cos, sin))
    return args, kwargs | {"position_embeddings": kept}


def _ordinary(cls: type) -> Any:
    return next(base for base in cls.__mro__ if not issubclass(base, _PerLayer))


@cache
def _made(name: str) -> Any:
    base = getattr(transformers, name.removeprefix("PerLayer"))
    return type(name, (_PerLayer, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """PerLayerXForCausalLM of any XForCausalLM of transformers, and PerLayerXModel of an XModel,
    which engines build their own model from: `auto_map` names both."""
    if name.startswith("PerLayer") and name.endswith(("ForCausalLM", "Model")):
        return _made(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def per_layer_class(model_type: str) -> Any:
    """The class of a family's models of per-layer widths."""
    return _made(f"PerLayer{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}")


def register(model_types: Iterable[str]) -> None:
    """Let `AutoModelForCausalLM` build per-layer widths; models without them are untouched."""
    for name in model_types:
        made = per_layer_class(name)
        AutoModelForCausalLM.register(CONFIG_MAPPING[name], made, exist_ok=True)
