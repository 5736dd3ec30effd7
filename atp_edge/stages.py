"""The stages of a run: each reads the run's folder and adds to it; each can be run again alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from atp_bench.latency import bench_onnx
from atp_export.checkpoint import load_narrow, save_narrow
from atp_export.graph import export_onnx
from atp_export.narrow import merge
from atp_export.verify import verify
from transformers import AutoTokenizer

from atp_edge.config import Config
from atp_edge.evaluate import perplexity
from atp_edge.families import ModelShape, model_shape
from atp_edge.plan import narrow_shape, read_plan, shares
from atp_edge.report import write_report
from atp_edge.run_folder import RunFolder
from atp_edge.structures import count_parameters
from atp_edge.train_stage import Progress, load_tuned, splits_of, train

VERIFY_PROMPTS = 20
VERIFY_PROMPT_TOKENS = 32
VERIFY_NEW_TOKENS = 64


def shrink(config: Config, run: RunFolder, progress: Progress) -> None:
    """plan.json and the tuned weights -> slim/, an ordinary Hugging Face checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(run.dense)
    tuned = load_tuned(config, run)
    if config.export.keep_adapter:
        # Names of the base model without peft's wrappers: what is left after unloading the LoRA.
        save_narrow(tuned.unload(), tokenizer, run.slim)
        load_tuned(config, run).save_pretrained(run.slim / "adapter")
    else:
        save_narrow(merge(tuned), tokenizer, run.slim)
    progress.say(f"slim model written to {run.slim}")
    slim = load_narrow(run.slim)
    blocks = splits_of(config).test.first(config.dataset.test_blocks)
    dense_shape = _dense_shape(run)
    kept = shares(dense_shape, model_shape(slim.config))
    run.add_metrics(
        "shrink",
        {
            "dense": _sizes(dense_shape, run.dense),
            "slim": _sizes(model_shape(slim.config), run.slim),
            "decoder_share": kept.decoder,
            "whole_share": kept.whole,
            "masked_narrow_max_error": run.metrics()["train"]["masked_narrow_max_error"],
            "perplexity": perplexity(slim, blocks),
        },
    )


def _dense_shape(run: RunFolder) -> ModelShape:
    return model_shape(load_config(run.dense))


def _sizes(shape: ModelShape, folder: Path) -> dict[str, int]:
    count = count_parameters(shape)
    return {
        "decoder_parameters": count.decoder,
        "parameters": count.whole,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
