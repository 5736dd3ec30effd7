"""Tiny random models of every family, and the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from atp_edge.config import Config, with_values
from atp_edge.data.domains import legal_texts
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.plan import Plan
from atp_edge.model.structures import Masks
from atp_edge.run.folder import RunFolder, open_run

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
}

FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}


def tiny_model(family: str, *, tied: bool = False, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model whose every parameter (biases and norms too) is away from its default."""
    config_class, extra = FAMILIES[family]
    config = config_class(**(SIZES | sizes), tie_word_embeddings=tied, **extra)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return model


QUICK_TO_TRAIN: dict[str, Any] = {
    "dataset.block_tokens": 32,
    "dataset.test_blocks": 2,
    "train.precision": "no",
    "decision.width_multiple": 4,
    "decision.importance_blocks": 2,
    "recovery.reconstruct_blocks": 2,
}


def masks_of(plan: Plan) -> Masks:
    """Fixed masks (bool [size] a site) of a plan."""
    return Masks(site.mask() for site in plan.sites)


class Silent:
    """Progress that only remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def phase(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...


def dense_run(folder: Path, real_folder: Path, **settings: Any) -> RunFolder:
    """A run of an untrained tiny model on licence texts, with its dense checkpoint alone."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    lines = [json.dumps({"text": text[:2500]}) for text, _ in legal_texts()[:120]]
    (folder / "data.jsonl").write_text("\n".join(lines))
    paths = {"model": "run/dense", "data": "data.jsonl", "out": "run"}
    values = {key: str(folder / path) for key, path in paths.items()}
    run = open_run(with_values(Config(), values | settings))
    save_narrow(tiny_model("llama", tied=True, vocab_size=len(tokenizer)), tokenizer, run.dense)
    return run


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: more only wait for each other, longest where others compute."""
    real = request.node.get_closest_marker("real") is not None
    torch.set_num_threads((os.cpu_count() or 1) if real else 1)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """SmolLM2-135M-Instruct from its package, as a Hugging Face folder."""
    from atp_edge.data.domains import demo_model_folder

    return demo_model_folder()
