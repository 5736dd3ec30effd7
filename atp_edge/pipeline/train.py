"""The first stage: the parts of training in their order, and the figures that they leave."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from atp_kernels import backend_name

from atp_edge.config import Config
from atp_edge.data.splits import Splits
from atp_edge.model.plan import read_plan
from atp_edge.pipeline.model_card import write_card
from atp_edge.run import ranks
from atp_edge.run.folder import RunFolder
from atp_edge.run.freed_memory import stop_keeping_freed_memory
from atp_edge.run.peak_memory import peak_noted
from atp_edge.run.progress import Progress
from atp_edge.training.dense_adapter import save_adapter
from atp_edge.training.phases import PARTS, run_part
from atp_edge.training.setup import TrainContext, accelerate, splits_of


def train(config: Config, run: RunFolder, progress: Progress) -> None:
    """Learn the plan and the slim model's weights; writes dense/, plan.json and adapter/.

    Called on every rank of a launch; rank 0 writes.
    """
    began = time.perf_counter()
    accelerator = accelerate(config)
    if run.parts():  # A run that begins has read it.
        progress.say("reading the domain text")
    splits = splits_of(config)
    for said in splits.report.said(config.dataset.special_tokens):
        progress.say(said)
    epochs = config.train_blocks / len(splits.train.input_ids)
    if epochs > 1:
        progress.say(f"the train split is read {epochs:.1f} times")
    for said in left_out(config):
        progress.say(said)
    context = TrainContext(
        config=config, run=run, splits=splits, accelerator=accelerator, progress=progress
    )
    parts = {name: run_part(name, context) for name in PARTS}
    with peak_noted("adapter", run.memory_json):
        adapter = save_adapter(context, read_plan(run.plan))
    stop_keeping_freed_memory()
    if not ranks.is_main():
        return
    figures = _figures(config, run, splits, parts) | {"adapter": adapter}
    # Of a run that was gone on with, the parts that were done before took their time too.
    whole = max(time.perf_counter() - began, sum(part["seconds"] for part in parts.values()))
    run.add_metrics("train", figures | {"seconds": whole})
    if adapter["written"]:
        write_card("adapter", config, run)


def left_out(config: Config) -> list[str]:
    """What a run does without when the freeze comes before the first step or after the last."""
    share, steps = config.decision.control_share, config.control_steps
    found = []
    if config.decision.learn and not steps:
        found.append(f"decision.control_share = {share:g}: the decision is frozen at its start")
    if steps == config.steps:
        found.append(f"decision.control_share = {share:g}: no step is left for recovery")
    return found


def _figures(
    config: Config, run: RunFolder, splits: Splits, parts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What metrics.json says of the stage."""
    dense, frozen, recovered = (parts[name] for name in PARTS)
    return {
        "untuned_perplexity": dense["untuned_perplexity"],
        "dense_tuned_perplexity": dense["perplexity"],
        "perplexity_at_freeze": frozen["perplexity"],
        "perplexity": recovered["perplexity"],
        "recovery": dense["perplexity"] / recovered["perplexity"],
        "block_losses": {
            "untuned": dense.get("untuned_block_losses"),  # Runs of before have none.
            "dense": dense["block_losses"],
            "slim": recovered["block_losses"],
        },
        "masked_narrow_max_error": frozen["masked_narrow_max_error"],
        "steps": config.steps,
        "tokens": config.train_tokens,
        "kernels": backend_name(),
        "budget": config.budget,
        "decoder_share": frozen["decoder_share"],
        "whole_share": frozen["whole_share"],
        "plan_sha256": read_plan(run.plan).sha256,
        "data": asdict(splits.report),
        "kept_step": recovered["kept_step"],
        "returns": [text for part in parts.values() for text in part["returns"]],
    }
