"""SHA-256 of files and folders: no change goes unseen, whatever a file's times say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from atp_edge.run.hashes import combined_sha256, difference, file_sha256, files_sha256


def test_a_changed_byte_is_seen_though_size_and_time_are_what_they_were(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    before, stat = file_sha256(file), file.stat()
    assert before == hashlib.sha256(b"abc").hexdigest()
    file.write_bytes(b"abd")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(file) == hashlib.sha256(b"abd").hexdigest()


def test_a_folder_is_all_its_files_but_hidden_ones_and_caches(tmp_path: Path) -> None:
    for name in ("slim/config.json", "slim/adapter/weights", "slim/.hidden/x", "slim/.x.lock",
                 "slim/__pycache__/x.pyc", "plan.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "slim" / "pipe")
    found = files_sha256(tmp_path, ["slim", "plan.json", "gone"])
    assert list(found) == ["slim/adapter/weights", "slim/config.json", "plan.json"]
    (tmp_path / "slim" / "manifest.json").touch()
    listed = files_sha256(tmp_path, ["slim"])
    assert {"slim/.hidden/x", "slim/.x.lock", "slim/__pycache__/x.pyc"} <= listed.keys()
    assert found["plan.json"] == hashlib.sha256(b"plan.json").hexdigest()


def test_a_difference_names_the_file_and_how_it_differs() -> None:
    assert difference({"a": "1"}, {"a": "1"}) is None
    assert difference({"a": "1"}, {}) == "a is gone"
    assert difference({}, {"a": "1"}) == "a is new"
    changed = difference({"a": "1" * 64, "b": "1" * 64}, {"a": "1" * 64, "b": "2" * 64})
    assert changed == "b changed (SHA-256 111111111111… then, 222222222222… now)"


def test_several_files_have_one_hash_that_sha256sum_can_check() -> None:
    assert combined_sha256({".": "ab"}) == "ab"
    lines = b"cd  a.json\nab  b.json\n"
    both = {"b.json": "ab", "a.json": "cd"}
    assert combined_sha256(both) == hashlib.sha256(lines).hexdigest()
