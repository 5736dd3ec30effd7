"""What any stage of a run would refuse, asked before the first: nothing is written until then."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from atp_export.export import check_exportable

from atp_edge.config import Config, DecisionConfig
from atp_edge.model.families import longest_text, model_shape
from atp_edge.model.loading import CONFIG, check_model, read_generation
from atp_edge.model.storage import context_of
from atp_edge.pipeline.inputs import check_text
from atp_edge.run.files import check_place
from atp_edge.run.folder import RunFolder
from atp_edge.run.pinned import PROTECT
from atp_edge.run.precision import precision_of
from atp_edge.run.records import StageName
from atp_edge.training.frozen import NF4, check_base, check_shards
from atp_edge.training.setup import (
    check_text_fits,
    feasible_of,
    model_source,
    quantizer_of,
    source_config,
    tokenizer_of,
)

if TYPE_CHECKING:
    from atp_edge.gate.prompts import Rule
    from atp_edge.gate.settings import GateSettings


def check_run(
    config: Config,
    stages: Sequence[StageName],
    *,
    weights: bool = True,
    elsewhere: bool = False,
) -> None:
    """Raise the ValueError, or OSError, that one of the stages or a later one would raise for the
    model or a setting.

    The model is read, a tensor at a time, before a run begins; from then on its hash is pinned, and
    that the tensors are there is looked up in the files' headers. weights: off, its configuration
    is read, and nothing else of it. elsewhere: it will run on another machine, a GPU with all that
    settings need.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {config.out!r} is a file; name a folder, new or of a run")
    check_place(out / "a file", f"out = {config.out!r}")
    if "verify" in stages:
        check_provable(config)
    gated = check_gate(config) if "gate" in stages else None
    if not elsewhere:
        check_precision(config)
        check_installed(config)
    begun = RunFolder(out).records.inputs is not None
    if not begun:  # and cannot be changed then
        check_text("data", config.data)
        check_protect(config)
    folder, source = model_source(config.model), source_config(config)
    try:
        model_shape(source)
        check_export(config, source)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    check_base(config)
    check_shards(config)
    check_rank(config, source)
    feasible_of(config, source)
    check_lengths(config, source)
    if not weights:
        return
    tokenizer = tokenizer_of(config)
    check_text_fits(config, source, tokenizer)
    if gated is not None:
        check_window(*gated, config, source, tokenizer)
    read_generation(folder)
    check_model(folder, trust_remote_code=config.trust_remote_code, values=not begun)


def check_protect(config: Config) -> None:
    """What is protected is there, and its share is of something and not nothing."""
    share = config.decision.protect_share
    if config.protect:
        check_text(PROTECT, config.protect)
    if config.protect and not share:
        raise ValueError(
            "decision.protect_share = 0: nothing of --protect is kept; give more, or leave "
            "--protect out"
        )
    if not config.protect and share != DecisionConfig.protect_share:
        raise ValueError(
            f"decision.protect_share = {share}: it is of --protect, and nothing is protected"
        )


def check_gate(config: Config) -> tuple[GateSettings, list[Rule]]:
    """The thresholds can be read, and so can the files that they name; they, and the prompts'
    rules."""
    from atp_edge.gate.material import asked_of
    from atp_edge.pipeline.gate import settings_of_run

    settings = settings_of_run(config)
    rules, _, _ = asked_of(config, settings)
    return settings, rules


def check_window(
    settings: GateSettings, rules: Sequence[Rule], config: Config, source: Any, tokenizer: Any
) -> None:
    """What ships can read what the gate asks of it."""
    from atp_edge.gate.material import check_askable

    shipped = context_of(source, config.export.context)
    window = shipped if settings.form == "onnx" else longest_text(source)
    check_askable(config, settings, rules, tokenizer, window)


def check_precision(config: Config) -> None:
    """The device computes in the type that training does."""
    cuda = torch.cuda.is_available()
    if config.train.precision == "fp16" and not cuda:
        raise ValueError(
            "train.precision = 'fp16': its gradients are scaled on a GPU alone, and torch finds "
            "none here; take --train-precision auto, bf16 or no"
        )
    if (
        cuda
        and precision_of(config) == "bf16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"train.precision = 'bf16': {torch.cuda.get_device_name()} does not compute in it; "
            "take --train-precision fp16"
        )


def check_installed(config: Config) -> None:
    """What keeps weights and moments in few bits is there, and the device that it wants."""
    few = {
        "train.base_dtype = 'nf4'": config.train.base_dtype == NF4,
        "train.moments = '8bit'": config.train.moments == "8bit",
    }
    for setting in (name for name, asked in few.items() if asked):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"{setting} is bitsandbytes' and it is not installed: pip install bitsandbytes, or "
                "take another value"
            )
    if config.train.moments == "8bit" and not torch.cuda.is_available():
        raise ValueError(
            "train.moments = '8bit': bitsandbytes keeps them on a GPU alone, and torch finds none "
            "here; take --train-moments fp32"
        )


def check_export(config: Config, source: Any) -> None:
    """Flavour, precision, quantizer, context and RoPE go together; LoRA can be kept apart."""
    settings = config.export
    check_exportable(
        source,
        flavour=settings.flavour,
        precision=settings.precision,
        quantizer=quantizer_of(settings),
        context=settings.context,
    )
    if settings.keep_adapter and config.recovery.adapter == "dora":
        raise ValueError(
            "export.keep_adapter with recovery.adapter = 'dora': a .onnx_adapter holds LoRA's "
            "factors alone, not DoRA's magnitudes; take lora or ranks, or merge it"
        )


def check_rank(config: Config, source: Any) -> None:
    """A LoRA is of a lower rank than the matrices it is added to."""
    if config.lora.rank > source.hidden_size:
        raise ValueError(
            f"lora.rank = {config.lora.rank}: no projection of this model has a rank above its "
            f"hidden size, {source.hidden_size}; take that many or fewer"
        )


def check_lengths(config: Config, source: Any) -> None:
    """No text that is trained on, tested or timed is longer than its model may read."""
    shipped = context_of(source, config.export.context)
    block, bench = config.dataset.block_tokens, config.bench
    if config.export.precision != "fp32" and block > shipped:
        raise ValueError(
            f"dataset.block_tokens = {block}: what {config.export.precision} costs is measured on "
            f"whole blocks, and the exported context is {shipped}; take a larger export.context"
        )
    timed = bench.prompt_tokens + bench.new_tokens + 1
    if timed > shipped:
        raise ValueError(
            f"bench.prompt_tokens = {bench.prompt_tokens} and bench.new_tokens = "
            f"{bench.new_tokens} need {timed} positions, and the exported context is {shipped}; "
            "take fewer, or a larger export.context"
        )


def check_provable(config: Config) -> None:
    """A whole run proves what it ships."""
    if config.export.precision == "bf16":
        raise ValueError(
            "export.precision = 'bf16': a whole run proves what it ships, and our runtime feeds a "
            "cache of fp32 or fp16 alone; take fp16, or `atp-edge train`, `shrink` and `export`, "
            "which write bf16 unproven"
        )
