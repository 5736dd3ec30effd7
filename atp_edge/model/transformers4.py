"""What transformers 4 and SGLang read of a folder, beside what transformers 5 writes.

Without these keys 4.57 takes RoPE's default base, without a word, and finds no tokenizer class;
SGLang's Gemma 2 (0.5.23) stops where `hidden_act` is missing.
transformers 5 reads them as its own (tests/atp_edge/model/test_transformers4.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atp_edge.run.files import write_json

_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path")


def add_legacy_keys(folder: Path) -> None:
    """Add them to config.json and tokenizer_config.json of a folder, where these are there."""
    for name, add in (("config.json", _config), ("tokenizer_config.json", _tokenizer_config)):
        path = folder / name
        if path.exists():
            write_json(path, add(json.loads(path.read_text(encoding="utf-8"))))


def _config(written: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` where RoPE is scaled, `torch_dtype`; of layers that slide, where
    they have a RoPE of their own, `rope_local_base_freq`; `partial_rotary_factor`; `hidden_act`
    where the activation is under `hidden_activation` alone."""
    rope, legacy = dict(written["rope_parameters"]), {"torch_dtype": written["dtype"]}
    if "rope_type" not in rope:
        sliding = rope.get("sliding_attention")
        rope = dict(rope["full_attention"])
        if sliding is not None and sliding["rope_theta"] != rope["rope_theta"]:
            legacy["rope_local_base_freq"] = sliding["rope_theta"]
    legacy["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        legacy["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        # 4's Phi-3 takes these three and no other.
        factors = {key: rope[key] for key in ("short_factor", "long_factor")}
        legacy["rope_scaling"] = {"type": "longrope"} | factors
    elif rope["rope_type"] != "default":
        legacy["rope_scaling"] = rope
    if "hidden_activation" in written:
        legacy["hidden_act"] = written["hidden_activation"]
    return written | legacy


def _tokenizer_config(written: dict[str, Any]) -> dict[str, Any]:
    """A class that 4 has, and further special tokens under their name there, a list."""
    kept = {k: v for k, v in written.items() if k not in _OF_THIS_MACHINE}
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept
