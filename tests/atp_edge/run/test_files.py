"""Files are whole or not there; a full disk is said in one line; a lock dies with its holder."""

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atp_edge.run.errors import TakenError
from atp_edge.run.files import (
    file_atomically,
    file_lock,
    folder_atomically,
    read_json,
    settle,
    update_json,
    write_atomically,
)

LARGE = {"weight": torch.zeros(1 << 18)}  # 1 MiB


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writes then fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _by_torch(path: Path) -> None:
    with file_atomically(path) as beside, beside.open("wb") as file:
        torch.save(LARGE, file)


def _by_safetensors(path: Path) -> None:
    with folder_atomically(path) as beside:
        save_file(LARGE, beside / "model.safetensors")


def _as_text(path: Path) -> None:
    write_atomically(path, "x" * (1 << 20))


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [_by_torch, _by_safetensors, _as_text])
def test_what_does_not_fit_is_one_error_and_leaves_the_old_file(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    write(path)
    before = _files(tmp_path)
    with room_for(1 << 19), pytest.raises(OSError, match=rf"no room for {path}: .* MB are free"):
        write(path)
    assert _files(tmp_path) == before


def _fail(path: Path) -> None:
    with folder_atomically(path) as beside:
        (beside / "half").write_text("written")
        raise KeyError("mine")


def test_the_name_of_a_file_that_is_no_utf8_ends_no_report(tmp_path: Path) -> None:
    write_atomically(tmp_path / "page.html", f"read {os.fsdecode(b'notes-' + bytes([255]))}")
    assert (tmp_path / "page.html").read_text() == "read notes-?"


def test_another_error_is_itself_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        _fail(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_one_process_s_alone_until_that_one_ends_or_is_killed(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from atp_edge.run.files import file_lock\n"
        "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    folder = tmp_path / "runs" / "notes"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TakenError, match=f"another process works on {folder}; wait"):
            file_lock(folder).__enter__()
        with file_lock(tmp_path / "runs" / "other"):
            pass
        with file_lock(folder, waiting=holder.kill):
            assert holder.wait() < 0, "it waited until the holder was killed"
    finally:
        holder.kill()
    with file_lock(folder):
        pass


def test_sections_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    names = [f"stage {i}" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: update_json(file, name, {"seconds": 1}), names))
    assert read_json(file).keys() == set(names)


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("before", [{}, {"config.json": "old", "sub/weights": "old"}])
def test_a_kill_between_any_two_steps_leaves_the_old_folder_or_the_new(
    tmp_path: Path, before: dict[str, str]
) -> None:
    """A process is killed before its first, second, … change of the file system, until one of them
    gets through."""
    after = {"config.json": "new", "sub/more": "new"}
    for kill_before in itertools.count():
        folder = tmp_path / str(kill_before) / "slim"
        for name, text in before.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        folder.parent.mkdir(exist_ok=True)
        if (child := os.fork()) == 0:
            _write_until(folder, after, kill_before)
        done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        settle(folder)
        assert _tree(folder.parent) in (
            {f"slim/{name}": text for name, text in tree.items()} for tree in (before, after)
        )
        if done:
            break
    assert _tree(folder) == after
    assert kill_before > 6


def _write_until(folder: Path, files: dict[str, str], kill_before: int) -> None:
    """Write a folder anew, in a process that ends before this change of the file system."""
    changes = itertools.count()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR)
        change = writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if change and next(changes) == kill_before:
            os._exit(9)

    sys.addaudithook(watch)
    try:
        with folder_atomically(folder) as beside:
            for name, text in files.items():
                (beside / name).parent.mkdir(exist_ok=True)
                (beside / name).write_text(text)
    finally:
        os._exit(0)


def test_all_of_it_is_on_the_disk_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(Path(f"/proc/self/fd/{fd}").readlink()))
    rename = Path.rename

    def checked(path: Path, target: Path) -> Path:
        assert {path, *path.rglob("*")} <= synced
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    with folder_atomically(tmp_path / "slim") as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "weights").write_text("w")
    write_atomically(tmp_path / "metrics.json", "{}")
    assert tmp_path in synced
    assert tmp_path / ".metrics.json.partial" in synced


def test_a_folder_that_is_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights").write_text("theirs")
    (tmp_path / "dense").symlink_to(tmp_path / "shared")
    with folder_atomically(tmp_path / "dense") as beside:
        (beside / "weights").write_text("ours")
    assert _tree(tmp_path) == {"dense/weights": "ours", "shared/weights": "theirs"}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff{}", b"", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.json is damaged \(.*put it back"):
        read_json(tmp_path / "metrics.json")


def test_the_folder_one_stands_in_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with file_lock(Path()), pytest.raises(TakenError):
        file_lock(tmp_path).__enter__()
