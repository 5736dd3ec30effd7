"""Latency and memory of what was exported, dense and slim in turn."""

from __future__ import annotations

from atp_bench.engines.latency import bench_onnx

from atp_edge.config import Config
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress


def bench(config: Config, run: RunFolder, progress: Progress) -> None:
    """Latency and memory of the dense and the slim ONNX model, in turn."""
    progress.say("measuring latency and memory, dense and slim in turn")
    settings = config.bench
    report = bench_onnx(
        {"dense": run.onnx_dense, "slim": run.onnx},
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        rounds=settings.rounds,
        threads=settings.threads or None,
    )
    run.add_metrics("bench", report.to_dict())
