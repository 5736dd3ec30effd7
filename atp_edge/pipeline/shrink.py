"""plan.json and the tuned weights -> slim/."""

from __future__ import annotations

from pathlib import Path

from atp_edge.config import Config
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.model.checkpoint import load_narrow, save_narrow, shape_of
from atp_edge.model.families import ModelShape
from atp_edge.model.loading import load_tokenizer
from atp_edge.model.narrow import merge
from atp_edge.model.plan import shares
from atp_edge.model.structures import count_parameters
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.dense_adapter import write_peft
from atp_edge.training.narrow_state import load_tuned
from atp_edge.training.setup import splits_of


def shrink(config: Config, run: RunFolder, progress: Progress) -> None:
    """plan.json and the tuned weights -> slim/, a Hugging Face checkpoint of narrow layers."""
    tokenizer = load_tokenizer(run.dense, trust_remote_code=config.trust_remote_code)
    tuned = load_tuned(config, run)
    if config.export.keep_adapter:
        save_narrow(tuned.unload(), tokenizer, run.slim, like=run.dense)
        write_peft(load_tuned(config, run), run.slim / "adapter", config)
    else:
        save_narrow(merge(tuned), tokenizer, run.slim, like=run.dense)
    progress.say(f"slim model in {run.slim}; measuring it from there")
    dense_shape, slim_shape = shape_of(run.dense), shape_of(run.slim)
    kept = shares(dense_shape, slim_shape)
    blocks = splits_of(config).test
    run.add_metrics(
        "shrink",
        {
            "dense": _sizes(dense_shape, run.dense),
            "slim": _sizes(slim_shape, run.slim),
            "decoder_share": kept.decoder,
            "whole_share": kept.whole,
            "masked_narrow_max_error": run.metrics()["train"]["masked_narrow_max_error"],
            "perplexity": perplexity(load_narrow(run.slim), blocks),
        },
    )


def _sizes(shape: ModelShape, folder: Path) -> dict[str, int]:
    count = count_parameters(shape)
    return {
        "decoder_parameters": count.decoder,
        "parameters": count.whole,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
