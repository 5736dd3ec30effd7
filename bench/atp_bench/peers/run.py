"""A run's own models, or the demo model and cuts of it, against other engines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atp_export.runtime import usable_cores

from atp_bench.peers.compare import Models, check_peers, compare, demo_models
from atp_edge.config import Config
from atp_edge.data.domains import demo_model_folder
from atp_edge.model.checkpoint import shape_of
from atp_edge.model.plan import shares
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress

# 128 + 128 tokens; of the demo model's decoder, 40 % removed.
PEERS_TOKENS = 128
PEERS_SHARE = 0.6
PEERS_PRECISIONS = ("fp32", "int4")


def bench_peers(
    config: Config,
    run: RunFolder | None,
    peers: Sequence[str],
    precisions: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Dense and slim models against other engines; the demo model and cuts of it without a run.

    A run's figures also go to its metrics. precisions: by default fp32 and int4.
    """
    precisions = precisions or PEERS_PRECISIONS
    check_peers(peers, precisions)
    threads = config.bench.threads or usable_cores()
    with tempfile.TemporaryDirectory() as temporary:
        if run:
            models = _models_of(run)
        else:
            models = demo_models(demo_model_folder(), Path(temporary), PEERS_SHARE, progress.say)
        found = {
            precision: compare(
                models,
                precision,
                peers=peers,
                prompt_tokens=PEERS_TOKENS,
                new_tokens=PEERS_TOKENS,
                batch=config.bench.batch,
                rounds=config.bench.rounds,
                threads=threads,
                say=progress.say,
            )
            for precision in precisions
        }
    figures = {"precisions": found, "note": models.note}
    if run:
        run.add_metrics("peers", figures)
    return figures


def _models_of(run: RunFolder) -> Models:
    """A run's own dense and slim checkpoints. Raises ValueError for a stage that has not run."""
    run.require("dense", "slim")
    kept = shares(shape_of(run.dense), shape_of(run.slim)).decoder
    note = f"dense and slim model of {run.path}; slim keeps {kept:.1%} of the decoder's parameters"
    return Models(dense=run.dense, slims={"slim": run.slim}, note=note)
