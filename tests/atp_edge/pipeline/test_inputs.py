"""What a run begins with: the files of a model that are read, from a folder or from the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from atp_edge.config import Config
from atp_edge.pipeline.inputs import inputs_of
from atp_edge.run.hashes import files_sha256
from atp_edge.settings import with_values

READ = {
    "template": ["additional_chat_templates/tools.jinja", "chat_template.jinja"],
    "tokenizer": ["merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json"],
    "model": ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
              "modeling_own.py"],
}  # fmt: skip
UNREAD = ["README.md", "LICENSE", "pytorch_model.bin", ".gitattributes", "runs/events.json"]


def model_folder(folder: Path) -> Path:
    for name in (*(n for names in READ.values() for n in names), *UNREAD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    save_file({}, folder / "model-00001-of-00001.safetensors")
    return folder


def test_every_file_that_is_read_is_under_what_reads_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    inputs = inputs_of(with_values(Config(), {"model": str(folder)}))
    for kind, names in READ.items():
        assert inputs[kind] == {"source": str(folder), "files": files_sha256(folder, names)}
    assert inputs["data"]["package"].startswith("licensedcode-data 32.")
    assert inputs["model_commit"] is None


def test_a_model_of_the_hub_is_pinned_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "ab" * 20
    cached = tmp_path / "models--owner--name"
    folder = model_folder(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    inputs = inputs_of(with_values(Config(), {"model": "owner/name"}))
    assert inputs["model_commit"] == commit
    assert inputs["model"] == {
        "source": "owner/name",
        "files": files_sha256(folder, READ["model"]),
    }
