"""plan.json and the tuned weights -> slim/."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from atp_edge.config import Config
from atp_edge.evaluation.text_loss import streamed_text_loss
from atp_edge.model.checkpoint import build_on_meta, shape_of, write_checkpoint
from atp_edge.model.families import ModelShape
from atp_edge.model.loading import load_tokenizer, read_tensor, stored_type
from atp_edge.model.merged import MergedWeights
from atp_edge.model.plan import shares
from atp_edge.model.structures import count_parameters
from atp_edge.pipeline.model_card import write_card
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.dense_adapter import write_peft
from atp_edge.training.narrow_state import load_tuned, narrow_file, tuned_on_meta
from atp_edge.training.setup import splits_of


def shrink(config: Config, run: RunFolder, progress: Progress) -> None:
    """plan.json and the tuned weights -> slim/, a Hugging Face checkpoint of narrow layers."""
    tokenizer = load_tokenizer(run.dense, trust_remote_code=config.trust_remote_code)
    _write_slim(config, run, tokenizer)
    progress.say(f"measuring the slim model as it lies in {run.slim}")
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
            "perplexity": streamed_text_loss(run.slim, blocks).perplexity,
        },
    )
    write_card("slim", config, run)


def _write_slim(config: Config, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tuned weights, merged one at a time; or the base's, with the adapter beside it."""
    tuned, file = tuned_on_meta(config, run), narrow_file(run, "tuned")
    keep = config.export.keep_adapter
    write_checkpoint(
        build_on_meta(tuned.get_base_model().config),
        MergedWeights(tuned, lambda name: read_tensor(name, file), merged=not keep),
        tokenizer,
        run.slim,
        like=run.dense,
        dtype=stored_type(run.dense),
    )
    if keep:
        write_peft(load_tuned(config, run), run.slim / "adapter", config)


def _sizes(shape: ModelShape, folder: Path) -> dict[str, int]:
    count = count_parameters(shape)
    return {
        "decoder_parameters": count.decoder,
        "parameters": count.whole,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
