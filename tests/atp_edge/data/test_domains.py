"""The demo model, made once for all who ask for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atp_edge.data import domains
from atp_edge.run.files import folder_atomically, write_json


def test_processes_that_ask_for_the_demo_model_at_once_share_one_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def convert(folder: Path) -> None:
        made.append(folder)
        with folder_atomically(folder) as beside:
            write_json(beside / "config.json", {"model_type": "llama"})

    monkeypatch.setattr(domains, "_convert_demo_model", convert)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(domains.demo_model_folder, [tmp_path] * 8))
    assert set(found) == {tmp_path / domains.DEMO_MODEL}
    assert made == found[:1]
