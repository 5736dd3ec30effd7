"""Whether what ships is whole, and is what was proven: manifest, licence, tokenizer, proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atp_export.manifest import read_manifest, verify_manifest
from atp_export.runtime.described import described

from atp_edge.gate.results import Check
from atp_edge.gate.settings import Form
from atp_edge.gate.statistics import Status
from atp_edge.model.families import longest_text
from atp_edge.model.loading import load_config, load_tokenizer, read_generation
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import file_sha256

_NO_LICENCE = "not stated by the source folder"
SAMPLES = ("The quick brown fox, 12.5 %.", "Ünïcode – “quotes”\n\ttabs", "<|im_end|> as text")


class _NotSaidError(Exception):
    """Neither so nor not so: nobody says."""


def check_integrity(run: RunFolder, form: Form) -> list[Check]:
    """A check for each thing that must be so of the folder that ships."""
    return [_named(name, run, test) for name, test in _tests(form)]


def _named(name: str, run: RunFolder, test: Callable[[RunFolder], str]) -> Check:
    """test: says what is so, or raises ValueError: what is not."""
    status: Status = "passed"
    try:
        said = test(run)
    except _NotSaidError as error:
        said, status = str(error), "undecided"
    except (ValueError, OSError) as error:
        said, status = str(error), "failed"
    return Check(
        name=name, status=status, text=f"{name}: {said}", required=status != "undecided",
        items=1, clusters=1,
    )  # fmt: skip


def _tests(form: Form) -> Iterator[tuple[str, Callable[[RunFolder], str]]]:
    yield "tokenizer", lambda run: _tokenizer(run.dense, run.path / form)
    if form == "onnx":
        yield "manifest", _manifest
        yield "licence", _licence
        yield "end-tokens", _end_tokens
        yield "context", _context
    yield "proof", lambda run: _proof(run, form)


def _manifest(run: RunFolder) -> str:
    verify_manifest(run.onnx)
    return "every file is as it was written, and there are no others"


def _licence(run: RunFolder) -> str:
    licence = read_manifest(run.onnx).provenance.get("licence", "")
    if not licence or licence == _NO_LICENCE:
        raise _NotSaidError("the source model states none; ask its owner before you ship")
    return f"of the source model: {licence}"


def _tokenizer(dense: Path, ships: Path) -> str:
    first, second = load_tokenizer(dense), load_tokenizer(ships)
    for text in SAMPLES:
        before, after = (t(text, add_special_tokens=True)["input_ids"] for t in (first, second))
        if before != after:
            raise ValueError(f"{ships} reads {text!r} as {after}, {dense} as {before}")
    if first.get_vocab() != second.get_vocab():
        raise ValueError(f"{ships} has another vocabulary than {dense}")
    return f"reads as the dense model's ({len(second):,} tokens)"


def _end_tokens(run: RunFolder) -> str:
    ends, tokenizer = described(run.onnx).ends, load_tokenizer(run.onnx)
    stated = read_generation(run.dense).get("eos_token_id")
    wanted: list[Any] = stated if isinstance(stated, list) else [stated]
    missing = {x for x in (*wanted, tokenizer.eos_token_id) if x is not None} - ends
    if missing or not ends:
        raise ValueError(
            f"{run.onnx} ends a text at {sorted(ends)}, and not at {sorted(missing)}: it would "
            "write on; export it again"
        )
    return f"a text ends at {sorted(ends)}"


def _context(run: RunFolder) -> str:
    shipped = described(run.onnx).context
    own = longest_text(load_config(run.slim))
    if not shipped or shipped > own:
        raise ValueError(f"{run.onnx} states a context of {shipped}; the model reads {own}")
    return f"{shipped:,} tokens of the model's {own:,}"


def _proof(run: RunFolder, form: Form) -> str:
    """The record of verify, and that it read the files that are there now."""
    record = run.records.get("verify")
    if record is None or "verify" not in run.metrics():
        raise ValueError(f"nothing is proven yet; run `atp-edge verify --out {run.path}`")
    if record.failed:
        raise ValueError(record.failed)
    if trouble := run.records.trouble("verify"):
        raise ValueError(f"what was proven is not what is there: {trouble}; run verify again")
    own = {f"{form}/{p.name}": p for p in (run.path / form).iterdir() if p.is_file()}
    for name, path in own.items():
        if record.read.get(name) != file_sha256(path):
            raise ValueError(f"{name} is not the file that was proven; run verify again")
    return f"equal to its PyTorch model, proven of these {len(own)} files"
