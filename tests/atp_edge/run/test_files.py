"""Files are whole or not there; a full disk is said in one line; a lock dies with its holder."""

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
