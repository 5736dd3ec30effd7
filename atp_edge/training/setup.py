"""What a run starts from: the dense model, its tokenizer, the splits, the space of decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atp_edge.config import Config, ExportConfig, Quantizer
from atp_edge.data.documents import load_documents
from atp_edge.data.domains import demo_model_folder
from atp_edge.data.splits import ENOUGH_BLOCKS, Splits, make_splits
from atp_edge.decision.baselines import check_start
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.model.export_size import Shipped, files_beside
from atp_edge.model.families import model_shape
from atp_edge.model.storage import Storage, positions_of
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.training.cpu import attention_implementation, keep_freed_memory

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What `train.precision` computes in; no entry: fp32."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """What every part of training reads: its settings, its folder, its text, its device."""

    config: Config
    run: RunFolder
    splits: Splits
    accelerator: Accelerator
    progress: Progress


def model_source(name: str) -> str:
    """A folder or hub id as it is; `demo` is SmolLM2-135M-Instruct from its package.

    Raises ValueError for a path where no checkpoint lies.
    """
    if name == "demo":
        return str(demo_model_folder())
    hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if not hub_id and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model {name!r}: no config.json there; expected the folder of a Hugging Face "
            "checkpoint, a hub id (OWNER/NAME), or demo"
        )
    return name


def load_dense(config: Config) -> PreTrainedModel:
    """The dense model in fp32."""
    return AutoModelForCausalLM.from_pretrained(
        model_source(config.model), dtype=torch.float32
    ).eval()


def placed(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """The model on the device, with the attention to train with."""
    model.set_attn_implementation(attention_implementation(accelerator.device.type))
    return model.to(accelerator.device)


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
    head_dim = model_shape(dense_config).layers[0].head_dim
    storage = Storage(
        flavour=settings.flavour,
        precision=settings.precision,
        quantizer=quantizer_of(settings),
        rotary=(positions_of(dense_config), head_dim // 2),
        adapter_rank=config.lora.rank if settings.keep_adapter else None,
    )
    beside = files_beside(dense_config, tokenizer_of(config), config.decision.space)
    return Shipped(storage=storage, beside=beside)


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
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_source(config.model))
    return tokenizer


def splits_of(config: Config) -> Splits:
    """The run's three splits, disjoint by document; no block twice where the text suffices. Of the
    test split, the blocks that the run is tested on, spread over it."""
    tokenizer = tokenizer_of(config)
    splits = make_splits(
        load_documents(config.data, tokenizer),
        tokenizer,
        block_tokens=config.dataset.block_tokens,
        seed=config.seed,
        decision_share=config.dataset.decision_share,
        test_share=config.dataset.test_share,
        most_blocks=max(ENOUGH_BLOCKS, config.train_blocks),
    )
    return replace(splits, test=splits.test.spread(config.dataset.test_blocks))


def accelerate(config: Config) -> Accelerator:
    """accelerate's choice of device, in the run's precision."""
    accelerator = Accelerator(mixed_precision=config.train.precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
