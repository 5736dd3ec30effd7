"""What a run starts from: the dense model, its tokenizer, the splits, the space of decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp_edge.config import Config, ExportConfig, Quantizer
from atp_edge.data.blocks import Blocks, drawn, pack
from atp_edge.data.documents import Corpus, Document
from atp_edge.data.domains import demo_model_folder
from atp_edge.data.encoding import Encoder, check_tokenizer
from atp_edge.data.reader import read_corpus
from atp_edge.data.splits import (
    ENOUGH_BLOCKS,
    Splits,
    make_splits,
    pack_train,
    split_documents,
)
from atp_edge.decision.baselines import check_start
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.model.export_size import Shipped, files_beside
from atp_edge.model.families import longest_text, model_shape
from atp_edge.model.loading import CONFIG, load_config, load_model, load_tokenizer
from atp_edge.model.storage import Storage, context_of
from atp_edge.run.folder import RunFolder
from atp_edge.run.freed_memory import keep_freed_memory
from atp_edge.run.precision import precision_of
from atp_edge.run.progress import Progress
from atp_edge.training.cpu import attention_implementation

FROM_THE_HUB = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.py",
    "*.md",
    "LICENSE*",
]
"""What a run reads of a model's repository."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """What every part of training reads: its settings, its folder, its text, its device."""

    config: Config
    run: RunFolder
    splits: Splits
    accelerator: Accelerator
    progress: Progress


def hub_id_of(name: str) -> str | None:
    """The hub id that a model is named by; None: `demo`, or a path."""
    path = name.count("/") > 1 or name.startswith((".", "/", "~"))
    return None if name == "demo" or path or (Path(name) / CONFIG).is_file() else name


def model_source(name: str) -> Path:
    """The folder of a model: as named, a hub id's snapshot, or `demo`'s (SmolLM2-135M-Instruct).

    Raises ValueError for a path where no checkpoint lies, and an id that the Hub does not give.
    """
    if name == "demo":
        return demo_model_folder()
    if hub_id_of(name) is None:
        if not (Path(name) / CONFIG).is_file():
            raise ValueError(
                f"model {name!r}: no config.json there; expected the folder of a Hugging Face "
                "checkpoint, a hub id (OWNER/NAME), or demo"
            )
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=FROM_THE_HUB))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r}: no folder of that name with a config.json in {Path.cwd()}, and not "
            f"to be had from the Hub ({' '.join(str(error).split())[:300]})"
        ) from error


def source_config(config: Config) -> Any:
    """The dense model's configuration."""
    return load_config(model_source(config.model), trust_remote_code=config.trust_remote_code)


def load_dense(config: Config) -> PreTrainedModel:
    """The dense model in fp32, every tensor of it accounted for."""
    return load_model(model_source(config.model), trust_remote_code=config.trust_remote_code)


def placed(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """The model on the device, with the attention to train with."""
    return with_attention(model, accelerator.device).to(accelerator.device)


def with_attention(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with the attention to train with on a device."""
    capped = model_shape(model.config).scales.attention_cap is not None
    # No fused attention here knows a cap on its scores.
    model.set_attn_implementation("eager" if capped else attention_implementation(device.type))
    return model


def feasible_of(config: Config, dense_config: Any) -> FeasibleDecisions:
    """The feasible decisions of a run; ValueError when its budget cannot be met, or its structures
    not be scored."""
    check_start(config.decision.start, config.decision.space)
    budget = parse_budget(config.budget)
    if budget.kind == "bytes" and config.export.keep_adapter:
        _check_adapter(config)
    return feasible_decisions(
        model_shape(dense_config),
        budget,
        widths=config.widths,
        width_multiple=config.decision.width_multiple,
        structures=config.decision.space,
        shipped=shipped_of(config, dense_config) if budget.kind == "bytes" else None,
    )


def shipped_of(config: Config, dense_config: Any) -> Shipped:
    """How the run's model ships: what its bytes follow from."""
    settings = config.export
    pairs = model_shape(dense_config).rotary_pairs
    storage = Storage(
        flavour=settings.flavour,
        precision=settings.precision,
        quantizer=quantizer_of(settings),
        rotary=(context_of(dense_config, settings.context), pairs),
        adapter_rank=config.lora.rank if settings.keep_adapter else None,
    )
    alone = shapes_alone(model_source(config.model))
    beside = 0 if alone else files_beside(dense_config, tokenizer_of(config), config.decision.space)
    return Shipped(storage=storage, beside=beside)


def shapes_alone(folder: Path) -> bool:
    """Whether a model's folder has a configuration and no weights: enough for `--dry-run`."""
    return not any(folder.glob("*.safetensors"))


def _check_adapter(config: Config) -> None:
    if config.recovery.adapter == "ranks":
        raise ValueError(
            "a budget in bytes counts the adapter that export.keep_adapter ships, whose ranks "
            "follow from the decision with recovery.adapter = 'ranks': take recovery.adapter = "
            "'lora', or another budget"
        )


def quantizer_of(settings: ExportConfig) -> Quantizer:
    """The quantizer asked for; of int4's the one that loses least, where int8 loses next to nothing
    by any (`bench rounding`)."""
    if settings.quantizer != "auto":
        return settings.quantizer
    return "gptq" if settings.precision == "int4" else "nearest"


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The dense model's tokenizer."""
    return load_tokenizer(model_source(config.model), trust_remote_code=config.trust_remote_code)


def corpus_of(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | None = None,
    slice_by: str = "slice",
) -> Corpus:
    """The documents of a run, or of another source, read as the run's."""
    return read_corpus(
        source or config.data,
        tokenizer,
        special_tokens=config.dataset.special_tokens,
        skip_bad_lines=config.dataset.skip_bad_lines,
        slice_by=slice_by,
    )


def check_text_fits(config: Config, dense_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the model cannot read what the tokenizer and the settings make."""
    check_tokenizer(tokenizer, dense_config.vocab_size)
    longest, asked = longest_text(dense_config), config.dataset.block_tokens
    if asked > longest:
        raise ValueError(
            f"dataset.block_tokens = {asked}: the model reads {longest} positions "
            f"({_said_where(dense_config, longest)}); take --dataset-block-tokens {longest} or less"
        )


def _said_where(dense_config: Any, longest: int) -> str:
    if longest == dense_config.max_position_embeddings:
        return "max_position_embeddings"
    return "original_max_position_embeddings, beyond which its attention is another one"


@lru_cache(maxsize=1)
def splits_of(config: Config) -> Splits:
    """The run's three splits, disjoint by document; no block twice where the text suffices. Of the
    test split, the blocks that the run is tested on, spread over it. (Read once for all stages.)"""
    tokenizer = tokenizer_of(config)
    check_text_fits(config, source_config(config), tokenizer)
    corpus, protected = corpus_of(config, tokenizer), protected_documents(config, tokenizer)
    splits = make_splits(
        corpus.documents, tokenizer, protected=protected, **_drawing(config), **_packing(config)
    )
    report = replace(
        splits.report,
        rows_skipped=corpus.rows_skipped,
        rows_with_special_tokens=corpus.rows_with_special_tokens,
    )
    return replace(
        splits,
        test=splits.test.spread(config.dataset.test_blocks),
        report=report,
        protected=_packed(protected, config, tokenizer) if protected else None,
    )


def documents_by_split(
    config: Config, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> dict[str, list[Document]]:
    """Documents of the run's train, decision and test splits, before they are packed."""
    protected = protected_documents(config, tokenizer)
    return split_documents(documents, protected=protected, **_drawing(config))


def blocks_read(
    config: Config, tokenizer: PreTrainedTokenizerBase, train: Sequence[Document]
) -> Blocks:
    """The blocks that training reads of the documents of its split, each once."""
    blocks = pack_train(train, tokenizer, seed=config.seed, **_packing(config)).blocks
    return drawn(blocks, 0, min(config.train_blocks, len(blocks.input_ids)), seed=config.seed)


def _packing(config: Config) -> dict[str, Any]:
    """By which settings the documents of a split become blocks."""
    return {
        "block_tokens": config.dataset.block_tokens,
        "most_blocks": max(ENOUGH_BLOCKS, config.train_blocks),
        "canaries": config.canaries,
        "blocks_read": config.train_blocks,
    }


def _drawing(config: Config) -> dict[str, Any]:
    """By which settings documents are drawn for the splits."""
    names = ("decision_share", "test_share", "train_documents")
    return {"seed": config.seed} | {name: getattr(config.dataset, name) for name in names}


def protected_documents(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The text that the decision must keep, if any. Raises ValueError for a share that leaves
    nothing else."""
    if not config.protect:
        return []
    if config.decision.protect_share >= 1:
        raise ValueError(
            f"decision.protect_share = {config.decision.protect_share}: expected less than 1"
        )
    return corpus_of(config, tokenizer, source=config.protect).documents


def _packed(
    documents: list[Document], config: Config, tokenizer: PreTrainedTokenizerBase
) -> Blocks:
    """Blocks of all the documents joined; repeated where they do not fill one."""
    size = config.dataset.block_tokens
    found = pack(documents, Encoder(tokenizer), size, ENOUGH_BLOCKS)
    if not len(found.blocks.input_ids):
        times = -(-size // max(found.tokens, 1))
        found = pack(documents * times, Encoder(tokenizer), size, ENOUGH_BLOCKS)
    if not len(found.blocks.input_ids):
        raise ValueError(f"protect {config.protect!r}: nothing of it is learned; give answers")
    return found.blocks


def accelerate(config: Config) -> Accelerator:
    """accelerate's choice of device, in the run's precision."""
    accelerator = Accelerator(mixed_precision=precision_of(config))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
