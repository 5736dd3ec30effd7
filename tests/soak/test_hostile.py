"""Files that mean harm: none of them makes anything run, or runs for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atp_export.runtime.domain import read_profile

from atp_edge.data.reader import read_corpus
from atp_edge.training.loop import drop_damaged
from tests.tiny_tokenizers import tokenizer_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Harm:
    """Its pickle writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_no_checkpoint_is_unpickled(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    torch.save({"phase": Harm(tmp_path / "harm")}, tmp_path / "checkpoint" / "state.pt")
    said: list[str] = []
    drop_damaged(tmp_path, said.append)
    assert "state.pt is damaged" in said[0]
    assert not (tmp_path / "harm").exists()


def test_no_profile_is_unpickled(tmp_path: Path) -> None:
    held: Any = np.array([Harm(tmp_path / "harm")], dtype=object)
    np.savez(tmp_path / "domain.npz", bits=held, lengths=held, thresholds=held)
    with pytest.raises(ValueError, match=r"domain\.npz is no profile"):
        read_profile(tmp_path / "domain.npz")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{{ 'a' * 10 ** 15 }}",
    ],
)
def test_a_template_stays_in_its_sandbox(tmp_path: Path, template: str) -> None:
    path, began = tmp_path / "chats.jsonl", time.monotonic()
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1: the chat template"):
        read_corpus(str(path), tokenizer_of("byte-level", template=template))
    assert time.monotonic() - began < 5
