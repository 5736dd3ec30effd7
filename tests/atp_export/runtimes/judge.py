"""What a runtime said of a cell, beside what the file itself says.

`yes`: its tokenizer's ids are ours and its greedy tokens are those of `atp-edge generate`, all of
them. `near X`: a token that it took lies X spreads of the logits below the best one, which is as
good as the precision's arithmetic can tell. Anything else is `no: ` and why.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from atp_export.gguf.llama_cpp import node_folder
from atp_export.gguf.proof import TIE as GGUF_TIE
from atp_export.gguf.proof import prove_gguf
from atp_export.gguf.tensors import GgufPrecision
from atp_export.gguf.write import write_gguf
from atp_export.layouts.openvino_genai import TIE, below_best
from atp_export.runtime import Session

from tests.atp_export.runtimes.ask import Answers, Ask
from tests.atp_export.runtimes.cells import (
    GGUF,
    NEW_TOKENS,
    Cell,
    tokenizer_for,
    write_slim,
)

GGUF_NAMES: dict[str, GgufPrecision] = {
    "fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"
}  # fmt: skip
MOST_QUOTED = 240


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """seconds: of the runtime alone, not of writing the model."""

    says: str
    seconds: float

    @property
    def good(self) -> bool:
        return not self.says.startswith("no: ")


def try_onnx(cell: Cell, folder: Path, ask: Ask, texts: Sequence[str]) -> Outcome:
    """One runtime on the folder that `export_cell` wrote."""
    return _timed(lambda: _judge(cell, folder, texts, ask(folder, texts)), folder.parent)


def try_gguf(cell: Cell, texts: Sequence[str]) -> Outcome:
    """llama.cpp, by the proof that every export to GGUF has."""
    with tempfile.TemporaryDirectory() as root:
        write_slim(cell, Path(root) / "slim")
        return _timed(lambda: _llama_cpp(cell, Path(root), texts), Path(root))


def _timed(judged: Callable[[], str], root: Path) -> Outcome:
    began = time.perf_counter()
    try:
        says = judged()
    except Exception as error:
        says = f"no: {_told(error, root)}"
    return Outcome(says=says, seconds=round(time.perf_counter() - began, 1))


def _told(error: Exception, root: Path) -> str:
    """The line of an error that says most, without where this machine keeps files."""
    lines = [x.strip() for x in str(error).replace(str(root), "").splitlines() if x.strip()]
    most = [x for x in lines if "Got" in x or "rror" in x] or lines
    return (most[-1] if most else type(error).__name__)[:MOST_QUOTED]


def _judge(cell: Cell, folder: Path, texts: Sequence[str], said: Answers) -> str:
    tokenizer = tokenizer_for(cell.family)
    own = [tokenizer(text)["input_ids"] for text in texts]
    for row, theirs in zip(own, said.ids, strict=True):
        if row != theirs:
            pairs = enumerate(zip(row, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(row), len(theirs)))
            return f"no: other ids from {tokenizer.decode(row[at : at + 5])!r} on"
    session = Session(folder, threads=1)
    # A runtime that is told how many tokens to write takes none that ends.
    ends = session.ends | {tokenizer.eos_token_id}
    for made in said.tokens:
        assert len(made) == NEW_TOKENS, f"{len(made)} new tokens"
    below = [below_best(session, *pair, ends).max() for pair in zip(own, said.tokens, strict=True)]
    return _verdict(float(np.max(below)), TIE[cell.precision])


def _verdict(below: float, tie: float) -> str:
    if below == 0:
        return "yes"
    if below <= tie:
        return f"near {below:.1g}"
    return f"no: a token that it takes lies {below:.2g} spreads of the logits below the best"


def _llama_cpp(cell: Cell, root: Path, texts: Sequence[str]) -> str:
    assert cell.flavour == GGUF
    node = node_folder()
    assert node is not None, "node-llama-cpp is not at hand"
    precision, tokenizer = GGUF_NAMES[cell.precision], tokenizer_for(cell.family)
    blocks = torch.tensor([tokenizer(text)["input_ids"][:32] for text in texts])
    calibration = blocks if precision == "q4_0" else None
    file = write_gguf(root / "slim", root / "gguf", precision=precision, calibration=calibration)
    proof = prove_gguf(
        root / "slim", file, precision, tokenizer,
        prompts=texts, blocks=blocks, node=node, new_tokens=NEW_TOKENS,
    )  # fmt: skip
    if proof.failures:
        return f"no: {proof.failures[0]}"
    (greedy,) = [check for check in proof.checks if check.name == "greedy"]
    return _verdict(greedy.value, GGUF_TIE[precision])
