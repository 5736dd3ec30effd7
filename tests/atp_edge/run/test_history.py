"""The history of a run as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from atp_edge.run.history import read_history

LINE = b'{"step": 0, "phase": "dense", "loss": 1.0, "lr": 0.1, "tokens": 32}\n'


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"step": 1}', b"\xff", b"7"])
def test_a_line_that_is_no_step_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "history.jsonl").write_bytes(LINE + damage + b"\n" + LINE)
    with pytest.raises(ValueError, match=rf"{tmp_path}/history.jsonl, line 2: no step of a run"):
        read_history(tmp_path)
