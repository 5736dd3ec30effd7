"""Ids of drawn texts by llama.cpp's own rules: the tokenizer's, or said to be others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from atp_export.gguf.llama_cpp import node_folder
from atp_export.gguf.vocabulary import (
    checked_tokenizer,
    other_ids_in_llama_cpp,
    write_vocabulary,
)
from atp_export.tokenizer_files import read_tokenizer
from gguf import GGUFWriter
from tokenizers import Tokenizer

from tests.tiny_tokenizers import (
    BYTE_LEVEL,
    CORPUS,
    renamed_special,
    save_changed,
    save_learned,
)

NODE = node_folder()
SCRIPT = Path(__file__).with_name("vocabularies.mjs")
KINDS = [kind for kind in BYTE_LEVEL if kind != "llama-3"]
ASCII_CASES = ("gpt-4o", "tekken")
LACKING = {"model.vocab": lambda ids: {"▁" if t == "Ą" else t: i for t, i in ids.items()}}
"""No token for U+0004."""
CHANGED: dict[str, tuple[dict[str, Any], str, bool]] = {
    # The merge that stands twice counts where it stands last.
    "twice": ({"model.merges": lambda merges: [*merges, *merges[:40]]}, " ".join(CORPUS), True),
    "lacking": (LACKING, "a\x04b", True),
    "beside": ({"model.merges": lambda merges: [*merges, ["!", "?"]],
                "model.vocab": lambda ids: {"!?" if t == "Ą" else t: i for t, i in ids.items()}},
               "a!\x04?", False),
    "apart": (renamed_special("|||IP|||", "|||PHONE|||"), "|||IP||| |||PHONE|||IP", True),
    "overlap": (renamed_special("|||IP|||", "|||PHONE|||"), "|||IP|||PHONE|||", False),
}  # fmt: skip
"""Changes, a text, and whether its ids are the same."""


def write(folder: Path) -> Path:
    """A file of a vocabulary alone."""
    file = folder / "vocabulary.gguf"
    writer = GGUFWriter(file, "llama")
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    writer.add_vocab_size(size)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    write_vocabulary(writer, folder, checked_tokenizer(folder), size, [])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """(folder, texts that have other ids in llama.cpp), by the names of tokenizers; one start."""
    if NODE is None:
        pytest.skip("node-llama-cpp is not installed: `make test` installs it where npm is")
    root = tmp_path_factory.mktemp("vocabularies")
    texts = {kind: save_learned(root / kind, kind) for kind in KINDS}
    for name, (changes, text, _) in CHANGED.items():
        save_changed(root / name, "byte-level", changes)
        texts[name] = [text]
    asked = [{"file": str(write(root / n)), "texts": found} for n, found in texts.items()]
    done = subprocess.run(
        ["node", str(SCRIPT)], cwd=NODE, input=json.dumps(asked), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = {}
    for (name, own), theirs in zip(texts.items(), json.loads(done.stdout), strict=True):
        tokenizer = Tokenizer.from_file(str(root / name / "tokenizer.json"))
        ours = [tokenizer.encode(text, add_special_tokens=False).ids for text in own]
        wrong = [t for t, a, b in zip(own, ours, theirs, strict=True) if a != b]
        found[name] = (root / name, wrong)
    return found


def is_named(text: str) -> bool:
    kinds = {category(sign) for sign in text}
    beyond = any(sign.isalpha() and not sign.isascii() for sign in text)
    return bool(kinds & {"Mn", "Mc"}) or (beyond and bool(kinds & {"Lu", "Lt"}))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_texts_have_the_same_ids_or_are_named(kind: str, others: Any) -> None:
    folder, wrong = others[kind]
    said = other_ids_in_llama_cpp(read_tokenizer(folder)) or ""
    assert ("words with marks, or with capitals and letters" in said) == (kind in ASCII_CASES)
    assert bool(wrong) == (kind in ASCII_CASES)
    assert [text for text in wrong if not is_named(text)] == []


@pytest.mark.parametrize("name", CHANGED)
def test_ids_are_the_tokenizer_s_or_said_to_be_others(name: str, others: Any) -> None:
    (folder, wrong), (_, text, same) = others[name], CHANGED[name]
    assert wrong == ([] if same else [text])
    said = other_ids_in_llama_cpp(read_tokenizer(folder)) or ""
    assert ("bytes that have no token (04)" in said) == ("\x04" in text)
    assert ("added tokens overlap" in said) == ("|||" in text)
