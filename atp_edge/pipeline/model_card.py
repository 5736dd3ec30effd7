"""README.md of what a run ships, with the Hub's metadata: what it is, what it was made of, what it
is worth, and how to load it. It holds no path of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atp_export.genai_tokenizer import other_ids_in_genai
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from atp_edge.config import Config
from atp_edge.model.export_size import CARD_BYTES
from atp_edge.pipeline.model_card_use import GOOD_FOR, NOT_FOR, Layout, how_to_load
from atp_edge.pipeline.shipped_quality import shipped_perplexity
from atp_edge.pipeline.source_licence import licence_of
from atp_edge.pipeline.verdict import recovery_interval
from atp_edge.run.environment import version
from atp_edge.run.files import write_atomically
from atp_edge.run.folder import RunFolder
from atp_edge.training.setup import hub_id_of, model_source

Form = Literal["slim", "onnx", "adapter"]
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Kind = Literal[Form, Layout]
"""What a folder is: a form, or an exported folder's layout where that is not the plain one."""
LIBRARY: dict[Kind, str] = {
    "slim": "transformers",
    "onnx": "onnx",
    "adapter": "peft",
    "openvino": "openvino",
    "transformers.js": "transformers.js",
}
WHAT: dict[Kind, str] = {
    "slim": "a physically narrower checkpoint",
    "onnx": "a physically narrower model as ONNX",
    "adapter": "LoRA for the dense model",
    "openvino": "a physically narrower model as OpenVINO's IR",
    "transformers.js": "a physically narrower model as ONNX, laid out for transformers.js",
}
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run began with; hub_id: None where it is a folder."""

    name: str
    hub_id: str | None
    licence: str


def write_card(
    form: Form,
    config: Config,
    run: RunFolder,
    folder: Path | None = None,
    *,
    verified: dict[str, Any] | None = None,
    layout: Layout = "plain",
) -> str | None:
    """Write the card into the run's folder of this form, or into another that holds it; what it
    warns of.

    verified: what `verify` has found of these very files. layout: of an exported folder.
    """
    metrics = run.metrics() | {"verify": verified or {}}
    into = folder or run.path / form
    warning = other_ids_in_genai(into) if (form, layout) == ("onnx", "plain") else None
    write_atomically(into / CARD, card_of(form, config, metrics, layout, warning))
    return warning


def card_of(
    form: Form,
    config: Config,
    metrics: dict[str, Any],
    layout: Layout = "plain",
    warning: str | None = None,
) -> str:
    """The card's text, at most `CARD_BYTES` long: a budget in bytes counts it.

    warning: what to know of a runtime that it is loaded with.
    """
    source = source_of(config)
    kind: Kind = form if layout == "plain" else layout
    body = [
        f"# {source.name}, {'adapter' if form == 'adapter' else 'slim'}",
        _what(kind, source, config, metrics),
        "## What it is worth",
        _worth(form, config, metrics),
        "## Use",
        f"Good for: {GOOD_FOR}\n\nNot for: {NOT_FOR}",
        "## Load",
        how_to_load(form, config, source.hub_id or source.name, layout),
        *([f"{warning}."] if warning else []),
        "## Data",
        _data(config, metrics["train"]["data"]),
        "## Made by",
        _made_by(config, metrics),
    ]
    text = ModelCard(
        f"---\n{_metadata(form, kind, source, config, metrics)}\n---\n\n" + "\n\n".join(body)
    )
    content = f"{text.content}\n"
    assert len(content.encode()) <= CARD_BYTES, len(content.encode())
    return content


def source_of(config: Config) -> Source:
    """What the model's folder and its name say of it."""
    licence = licence_of(model_source(config.model))
    if config.model == "demo":
        return Source(name=DEMO_MODEL.split("/")[1], hub_id=DEMO_MODEL, licence=licence)
    hub_id = hub_id_of(config.model)
    return Source(name=Path(config.model).name[:80], hub_id=hub_id, licence=licence)


def data_name(config: Config) -> str:
    """The text by its name, never by its path."""
    return config.data if config.data in ("legal", "health") else Path(config.data).name[:80]


def _metadata(
    form: Form, kind: Kind, source: Source, config: Config, metrics: dict[str, Any]
) -> str:
    results = None
    if form != "adapter" and not _before_rounding(form, config, metrics):
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name="test split of the run's text",
                metric_type="perplexity",
                metric_value=round(shipped_perplexity(metrics), 3),
            )
        ]
    known = " " not in source.licence and not source.licence.startswith("LICENSE")
    data = ModelCardData(
        base_model=source.hub_id,
        license=source.licence if known else "other",
        library_name=LIBRARY[kind],
        pipeline_tag="text-generation",
        tags=["atp-edge", "lora"] if form == "adapter" else ["atp-edge", "pruned"],
        model_name=f"{source.name} {form}",
        eval_results=results,
    )
    text: str = data.to_yaml()
    return text


def _what(kind: Kind, source: Source, config: Config, metrics: dict[str, Any]) -> str:
    dense = f"[{source.hub_id}](https://huggingface.co/{source.hub_id})" if source.hub_id else ""
    text = f"{dense or source.name}, tuned on one domain: {WHAT[kind]}. "
    if kind != "adapter":
        train = metrics["train"]
        text += (
            f"{train['decoder_share']:.1%} of the decoder's parameters stay "
            f"({train['whole_share']:.1%} of all), {config.widths} widths. "
        )
    if config.model == "demo":
        text += "It began with weights that were dequantized from Q4_1. "
    return f"{text}Licence of the source: {source.licence}."


def _before_rounding(form: Form, config: Config, metrics: dict[str, Any]) -> bool:
    """Whether the file is rounded and what that costs is not known yet: `verify` measures it."""
    unknown = "quality" not in metrics.get("verify", {})
    return form == "onnx" and config.export.precision != "fp32" and unknown


def _worth(form: Form, config: Config, metrics: dict[str, Any]) -> str:
    train = metrics["train"]
    if form == "adapter":
        judged = train["adapter"]
        return (
            f"On {judged['blocks']} blocks of held-out text: perplexity "
            f"{judged['untuned_perplexity']:.2f} without it, {judged['perplexity']:.2f} with it, "
            f"{judged['dense_tuned_perplexity']:.2f} of the dense model tuned as a whole."
        )
    ours, precision = shipped_perplexity(metrics), config.export.precision
    unrounded = _before_rounding(form, config, metrics)
    tuned, ends = train["dense_tuned_perplexity"], recovery_interval(metrics)
    sure = f" (95 % interval {ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
    lines = [
        "| perplexity on the test split | |",
        "|---|---:|",
        f"| untouched model | {train['untuned_perplexity']:.2f} |",
        f"| dense model, tuned | {tuned:.2f} |",
        f"| **this model{', before rounding' if unrounded else ''}** | **{ours:.2f}** |",
        "",
        f"Recovery, tuned over this: {tuned / ours:.3f}{sure}.",
    ]
    if unrounded:
        lines += ["", f"What rounding to {precision} costs is not in these figures."]
    if ours > train["untuned_perplexity"]:
        lines += ["", "**It is worse on its own domain than the untouched model.**"]
    return "\n".join(lines)


def _data(config: Config, data: dict[str, Any]) -> str:
    def counted(of: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in of.items())

    return (
        f"`{data_name(config)}`, SHA-256 `{data['sha256']}`. Documents: "
        f"{counted(data['documents'])}. Tokens: {counted(data['tokens'])}. The splits share no "
        "document; the test split was never trained on."
    )


def _made_by(config: Config, metrics: dict[str, Any]) -> str:
    return (
        f"atp-edge {version('atp-edge')} (ATP, arXiv 2412.14426): budget {config.budget}, "
        f"{config.steps} steps, {metrics['train']['tokens']:,} tokens, seed {config.seed}, plan "
        f"`{metrics['train']['plan_sha256'][:16]}`."
    )
