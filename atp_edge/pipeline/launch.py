"""A run launched as several processes: rank 0 runs its stages, the others train with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from atp_edge.config import Config
from atp_edge.pipeline.fit import CHOSEN
from atp_edge.run import ranks
from atp_edge.run.environment import PACKAGES, version
from atp_edge.run.folder import RunFolder
from atp_edge.run.pinned import sources_in
from atp_edge.run.progress import Progress
from atp_edge.settings import values_of, with_values

TRAIN = "train"
LOST = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo", "Gloo")
"""In the message of a collective that another rank no longer answers."""


def check_ranks(config: Config, count: int | None = None) -> None:
    """Raise ValueError where a step's blocks do not share out evenly over the ranks; count: of
    them, by default those of this launch."""
    blocks, size = config.train.batch_blocks, ranks.size() if count is None else count
    if blocks % size:
        raise ValueError(
            f"train.batch_blocks = {blocks} on {size} ranks: expected a multiple of the ranks. "
            f"Take --train-batch-blocks {max(blocks // size, 1) * size}, or start fewer ranks"
        )


@contextmanager
def leading() -> Iterator[None]:
    """Rank 0's whole work; the others are let go where they were not called to train."""
    try:
        yield
    finally:
        ranks.from_main(None)


def follow(config: Config, progress: Progress) -> None:
    """Any other rank's whole work: wait until rank 0 trains, and train with it."""
    if ranks.from_main(None) == TRAIN:
        train_together(config, RunFolder(Path(config.out)), progress)


def train_together(config: Config, run: RunFolder, progress: Progress) -> None:
    """The training stage, on every rank at once; they part at its end.

    Raises OSError when another rank is lost: nothing is left to do but to start again.
    """
    from atp_edge.pipeline.train import train

    try:
        if ranks.is_main():
            ranks.from_main(TRAIN)
        config = _chosen_by_main(config)
        ranks.check_same(_start(config))
        train(config, run, progress)
    except RuntimeError as error:
        if ranks.size() > 1 and any(word in str(error) for word in LOST):
            raise OSError(
                "another rank has ended (its own output says why); start all of them again, as "
                "many as you like: training goes on from its last checkpoint"
            ) from error
        raise
    finally:
        ranks.leave()


def _chosen_by_main(config: Config) -> Config:
    """With the settings that rank 0 may have chosen by its device's memory."""
    values = values_of(config)
    chosen: dict[str, Any] = ranks.from_main({name: values[name] for name in CHOSEN})
    return with_values(config, chosen)


def _start(config: Config) -> dict[str, Any]:
    """What must be the same on every rank, by name."""
    from atp_edge.pipeline.inputs import inputs_of
    from atp_edge.run.hashes import value_sha256

    inputs = inputs_of(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        **{f"{name}'s version": version(name) for name in ("atp-edge", *PACKAGES)},
        "the kind of device": device,
        **inputs["settings"],
        **{
            f"the {kind}'s SHA-256": value_sha256(inputs[kind]["files"])
            for kind in sources_in(inputs)
        },
    }
