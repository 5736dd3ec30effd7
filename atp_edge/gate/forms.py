"""The models that are compared: the dense one, and the form that ships, with how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from atp_bench.onnx_model import OnnxModel
from atp_export.runtime import Generator, generate_tokens
from atp_export.runtime.described import described
from peft import PeftModel

from atp_edge.config import Config
from atp_edge.evaluation.scoring import LanguageModel, TorchModel
from atp_edge.gate.prompts import Answer, Ask, answered, asked_ids
from atp_edge.gate.settings import Form
from atp_edge.model.checkpoint import load_as_stored, load_narrow
from atp_edge.model.families import longest_text
from atp_edge.model.loading import load_config
from atp_edge.run.folder import RunFolder
from atp_edge.training.setup import tokenizer_of

ADAPTER = "adapter"


def window_of(run: RunFolder, form: Form, folder: Path) -> int:
    """Tokens that both models can read."""
    own = longest_text(load_config(run.dense))
    shipped = described(folder).context if form == "onnx" else None
    return min(own, shipped or own)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dense_model(run: RunFolder, *, as_stored: bool = False) -> LanguageModel:
    """as_stored: held in its checkpoint's type; it says the same, and takes longer."""
    if as_stored:
        return TorchModel(load_as_stored(run.dense, _device()))
    return TorchModel(load_narrow(run.dense).to(_device()))


def shipped(folder: Path, config: Config, form: Form, new_tokens: int) -> tuple[LanguageModel, Ask]:
    """The model in the folder that ships, with its adapter on where there is one, and how prompts
    are asked of it."""
    kept = config.export.keep_adapter
    if form == "onnx":
        file = folder / f"{ADAPTER}.onnx_adapter" if kept else None
        generator = Generator(folder, adapter=file, trust_remote_code=config.trust_remote_code)
        return OnnxModel(generator.session), _ask_onnx(generator, new_tokens)
    slim: Any = load_narrow(folder)
    if kept:
        slim = PeftModel.from_pretrained(slim, folder / ADAPTER)
    model = TorchModel(slim.to(_device()))
    return model, _ask_torch(model, tokenizer_of(config), new_tokens)


def _ask_onnx(generator: Generator, new_tokens: int) -> Ask:
    def ask(prompts: Sequence[str], chat: bool) -> list[Answer]:
        rows = [asked_ids(generator.tokenizer, prompt, chat) for prompt in prompts]
        made = generate_tokens(
            generator.session, rows, max_new_tokens=new_tokens, ends=generator.ends
        )
        return answered(generator.tokenizer, made, new_tokens)

    return ask


def _ask_torch(model: LanguageModel, tokenizer: Any, new_tokens: int) -> Ask:
    def ask(prompts: Sequence[str], chat: bool) -> list[Answer]:
        rows = [asked_ids(tokenizer, prompt, chat) for prompt in prompts]
        made = model.generate(rows, new_tokens=new_tokens, end=tokenizer.eos_token_id)
        return answered(tokenizer, made, new_tokens)

    return ask
