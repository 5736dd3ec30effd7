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
from atp_edge.run.files import read_json
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import file_sha256
from atp_edge.run.records import EXPORTED_FIGURES

_NO_LICENCE = "not stated by the source folder"
SAMPLES = ("The quick brown fox, 12.5 %.", "Ünïcode – “quotes”\n\ttabs", "<|im_end|> as text")


class _NotSaidError(Exception):
    """Neither so nor not so: nobody says."""


def check_integrity(run: RunFolder, form: Form, folder: Path) -> list[Check]:
    """A check for each thing that must be so of the folder that ships."""
    return [_named(name, test) for name, test in _tests(run, form, folder)]


def _named(name: str, test: Callable[[], str]) -> Check:
    """test: says what is so, or raises ValueError: what is not."""
    status: Status = "passed"
    try:
        said = test()
    except _NotSaidError as error:
        said, status = str(error), "undecided"
    except (ValueError, OSError) as error:
        said, status = str(error), "failed"
    return Check(
        name=name, status=status, text=f"{name}: {said}", required=status != "undecided",
        items=1, clusters=1,
    )  # fmt: skip


def _tests(run: RunFolder, form: Form, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "tokenizer", lambda: _tokenizer(run.dense, folder)
    if form == "onnx":
        yield "manifest", lambda: _manifest(folder)
        yield "licence", lambda: _licence(folder)
        yield "end-tokens", lambda: _end_tokens(run.dense, folder)
        yield "context", lambda: _context(run.slim, folder)
    own = folder == run.path / form
    yield "proof", lambda: _proof(run, form) if own else _proof_of_exported(folder)


def _manifest(folder: Path) -> str:
    verify_manifest(folder)
    return "every file is as it was written, and there are no others"


def _licence(folder: Path) -> str:
    licence = read_manifest(folder).provenance.get("licence", "")
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
    if first.chat_template != second.chat_template:
        raise ValueError(f"{ships} has another chat template than {dense}")
    return f"reads as the dense model's ({len(second):,} tokens)"


def _end_tokens(dense: Path, folder: Path) -> str:
    ends, tokenizer = described(folder).ends, load_tokenizer(folder)
    stated = read_generation(dense).get("eos_token_id")
    wanted: list[Any] = stated if isinstance(stated, list) else [stated]
    missing = {x for x in (*wanted, tokenizer.eos_token_id) if x is not None} - ends
    if missing or not ends:
        raise ValueError(
            f"{folder} ends a text at {sorted(ends)}, and not at {sorted(missing)}: it would "
            "write on; export it again"
        )
    return f"a text ends at {sorted(ends)}"


def _context(slim: Path, folder: Path) -> str:
    shipped = described(folder).context
    own = longest_text(load_config(slim))
    if not shipped or shipped > own:
        raise ValueError(f"{folder} states a context of {shipped}; the model reads {own}")
    return f"{shipped:,} tokens of the model's {own:,}"


def _proof_of_exported(folder: Path) -> str:
    """What `export --to` found when it wrote the folder; its manifest tells that nothing changed
    since."""
    proofs = read_json(folder / EXPORTED_FIGURES).get("providers", {})
    failed = [name for name, proof in proofs.items() if not proof["passed"]]
    if failed or not proofs:
        raise ValueError(f"{folder} is not proven{f' on {failed[0]}' if failed else ''}")
    return f"equal to its PyTorch model on {', '.join(proofs)}, proven as it was written"


def _proof(run: RunFolder, form: Form) -> str:
    """The record of verify, and that it read the files that are there now."""
    record = run.records.get("verify")
    if record is None or "verify" not in run.metrics():
        raise ValueError(f"nothing is proven yet; run {run.command('verify')}")
    if record.failed:
        raise ValueError(record.failed)
    if trouble := run.records.trouble("verify"):
        raise ValueError(f"what was proven is not what is there: {trouble}; run verify again")
    own = {f"{form}/{p.name}": p for p in (run.path / form).iterdir() if p.is_file()}
    for name, path in own.items():
        if record.read.get(name) != file_sha256(path):
            raise ValueError(f"{name} is not the file that was proven; run verify again")
    return f"equal to its PyTorch model, proven of these {len(own)} files"
