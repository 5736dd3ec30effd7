"""What consumers read beside the graph: configuration, end tokens, tokenizer, genai_config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from atp_edge.model.families import ModelShape
from atp_edge.model.loading import GENERATION, load_tokenizer, read_generation
from atp_edge.model.transformers4 import add_legacy_keys
from atp_edge.run.files import read_json, write_json

GENAI_TYPES = frozenset((
    "ernie4_5", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3",
    "smollm3",
))  # fmt: skip
"""The families of ours that onnxruntime-genai 0.18 knows by name. It refuses others, and computes
every decoder alike: by its graph."""


def describe(
    checkpoint: Path,
    out: Path,
    *,
    config: Any,
    shape: ModelShape,
    context: int,
    in_place: bool,
    trust_remote_code: bool = False,
) -> None:
    """Write all of it into an exported folder. in_place: the cache is one buffer, and positions are
    no input."""
    config.save_pretrained(out)
    tokenizer_end = None
    if (checkpoint / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(out)
        tokenizer_end = tokenizer.eos_token_id
    add_legacy_keys(out)
    settings = read_json(out / "config.json") | {"max_position_embeddings": context}
    settings.pop("auto_map", None)  # The modelling file lies beside the weights of PyTorch.
    write_json(out / "config.json", settings)
    if (checkpoint / GENERATION).exists():
        shutil.copyfile(checkpoint / GENERATION, out / GENERATION)
    ends = end_tokens(read_generation(checkpoint), settings, tokenizer_end)
    write_json(
        out / "genai_config.json", genai_config(settings, shape, context, ends, in_place=in_place)
    )


def end_tokens(
    generation: dict[str, Any], config: dict[str, Any], tokenizer_end: int | None
) -> list[int]:
    """Every token that ends a text: those of the generation settings (where they say none, the
    configuration's), and the tokenizer's, which ends the documents that were trained on."""
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    ends = [*stated] if isinstance(stated, list) else [stated]
    return [end for end in dict.fromkeys([*ends, tokenizer_end]) if end is not None]


def genai_config(
    config: dict[str, Any], shape: ModelShape, context: int, ends: list[int], *, in_place: bool
) -> dict[str, Any]:
    """onnxruntime-genai's configuration (its runtime reads each layer's cache from the graph).

    Special tokens that the model has not are left out: it refuses a null.
    """
    with_attention = [layer for layer in shape.layers if layer.heads]
    layer = with_attention[0]
    inputs = ["input_ids", "attention_mask"] + ["position_ids"] * (not in_place)
    pad = config.get("pad_token_id")
    special = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ends[0] if pad is None and ends else pad,
    }
    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "model": {
            "type": shape.family if shape.family in GENAI_TYPES else "llama",
            "vocab_size": shape.vocabulary,
            "context_length": context,
            **{name: token for name, token in special.items() if token is not None},
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "head_size": layer.head_dim,
                "hidden_size": shape.hidden,
                "num_attention_heads": layer.heads,
                "num_hidden_layers": len(with_attention),
                "num_key_value_heads": layer.kv_heads,
                "inputs": {name: name for name in inputs} | names,
                "outputs": {"logits": "logits"} | outputs,
            },
        },
        "search": {"max_length": context, "past_present_share_buffer": in_place},
    }
