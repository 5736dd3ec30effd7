"""What is tried: cut tiny models of four families, each with a tokenizer of its kind, on real text.

Loading and computing right are questions of operators, shapes and tokenizers, not of size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from atp_export.export import export_onnx
from transformers import AutoTokenizer

from atp_edge.data.domains import demo_model_folder, legal_texts
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import plan_of
from tests.tiny import PAIR_PLANS, tiny_model
from tests.tiny_tokenizers import tokenizer_of

ROOT = Path(__file__).parents[3]
FLAVOURS = ("ort", "standard", "portable")
GGUF = "gguf"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
WIDTHS = {
    "uniform": [(0, 2), range(32), (0, 1), range(8, 40), (1, 2), range(32, 64)],
    "per-layer": [(0, 2), range(8, 40), (1,), range(64), (0, 1, 2), range(16)],
}
"""KV groups of three and channels of 64 that a layer keeps; 32 of them make a block of int4."""
FAMILIES = {"llama": "", "qwen3": "qwen2", "gemma3": "gemma", "phi4-mini": "gpt-4o"}
"""The kind of each one's tokenizer (tests.tiny_tokenizers); Llama has the demo model's own."""
HIDDEN = {"phi4-mini": 192}
NEW_TOKENS = 12
MARKS = ("Gaustadalléen 21", "31-33\nrue de la Fédération", "本ソフトウェアは Everyone")
"""Where numbers, several spaces, new lines and letters outside ASCII stand close together."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model, as one flavour (or GGUF) and precision has it."""

    family: str
    flavour: str
    widths: str
    precision: str

    def __str__(self) -> str:
        return f"{self.family}/{self.flavour}/{self.widths}/{self.precision}"


def all_cells() -> list[Cell]:
    """Llama at every precision, the other families at two; what says most comes first."""
    tried = [
        (family, precision)
        for precision in ("int4", "fp32", "fp16", "int8")
        for family in FAMILIES
        if family == "llama" or precision in ("fp32", "int4")
    ]
    return [
        Cell(family=family, flavour=flavour, widths=widths, precision=precision)
        for (family, precision), flavour, widths in itertools.product(
            tried, (*FLAVOURS, GGUF), WIDTHS
        )
    ]


def passages() -> list[str]:
    """A few lines of licence texts around every mark."""
    texts = [text for text, _ in legal_texts()]
    found = []
    for mark in MARKS:
        text = next(text for text in texts if mark in text)
        at = text.index(mark)
        found.append(text[max(0, at - 60) : at + len(mark) + 30])
    return found


@cache
def tokenizer_for(family: str) -> Any:
    kind = FAMILIES[family]
    return tokenizer_of(kind) if kind else AutoTokenizer.from_pretrained(demo_model_folder())


def write_slim(cell: Cell, folder: Path) -> None:
    """The cut model and its tokenizer, as training leaves them."""
    tokenizer = tokenizer_for(cell.family)
    sizes = {"hidden_size": HIDDEN.get(cell.family, 96), "intermediate_size": 64}
    pairs = PAIR_PLANS.get(cell.widths)
    if pairs is not None:
        sizes["head_dim"] = 32
    model = tiny_model(cell.family, tied=True, vocab_size=len(tokenizer), **sizes)
    plan = (
        pairs(model)
        if pairs
        else plan_of(model_shape(model.config), [tuple(kept) for kept in WIDTHS[cell.widths]])
    )
    save_narrow(narrow_model(model, plan), tokenizer, folder)


def export_cell(cell: Cell, root: Path) -> Path:
    """root/slim, and what is exported from it, root/onnx; returns the latter."""
    write_slim(cell, root / "slim")
    options: dict[str, Any] = {"flavour": cell.flavour, "precision": cell.precision}
    export_onnx(root / "slim", root / "onnx", **options)
    return root / "onnx"
