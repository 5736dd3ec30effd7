"""A write that fails, anywhere: one error, and then the run goes on and ends the same.

ATP_WRITES=1 fails every write once (`make soak`), the default every eighth.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from atp_edge.config import Config
from atp_edge.pipeline.stages import run_stages
from atp_edge.run import files
from atp_edge.run.records import STAGES
from tests.soak.kills import outcome, source_in
from tests.tiny import Silent

EVERY = int(os.environ.get("ATP_WRITES", "8"))
THROUGH = STAGES[: STAGES.index("export") + 1]


@contextmanager
def failing(after: int, number: int) -> Iterator[list[Path]]:
    """The write after so many fails as it is brought to the disk; all that were."""
    brought, sync = list[Path](), files._sync

    def failing_once(path: Path) -> None:
        brought.append(path)
        if len(brought) == after + 1:
            raise OSError(number, os.strerror(number), str(path))
        sync(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", failing_once)
        yield brought


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return source_in(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(config: Config) -> tuple[dict[str, object], int]:
    """What a run comes to, and in how many writes."""
    with failing(-1, 0) as brought:
        run_stages(config, THROUGH, Silent())
    return outcome(config), len(brought)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no room for .*/run.* MB are free"), (errno.EROFS, "Read-only .*/run")],
    ids=["full", "read-only"],
)
def test_a_write_that_fails_is_one_error_and_the_run_goes_on(
    config: Config, whole: tuple[dict[str, object], int], tmp_path: Path, number: int, said: str
) -> None:
    wanted, count = whole
    assert count > 30
    one = replace(config, out=str(tmp_path / "run"))
    for after in range(0, count, EVERY):
        with failing(after, number) as brought:
            error = error_of(one)
        if error is None:
            assert len(brought) <= after, "its error was swallowed"
            break
        assert re.search(said, str(error))
    assert after > 0
    assert error_of(one) is None
    assert outcome(one) == wanted


def error_of(config: Config) -> OSError | None:
    """How a run ends."""
    try:
        run_stages(config, THROUGH, Silent())
    except OSError as error:
        return error
    return None
