"""What whole runs of a tiny model start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atp_edge.data.domains import legal_texts
from atp_edge.model.checkpoint import save_narrow
from tests.tiny import save_texts, tiny_model


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, real_folder: Path) -> Path:
    """A folder with a tiny model and text for it."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = tiny_model("llama", tied=True, vocab_size=len(tokenizer))
    save_narrow(model, tokenizer, folder / "model")
    save_texts(folder / "data.jsonl", (text[:2500] for text, _ in legal_texts()[:120]))
    return folder
