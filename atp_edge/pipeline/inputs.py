"""What a run begins with, by the SHA-256 of its files: looked at before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from atp_edge.config import Config
from atp_edge.run.environment import version
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import combined_sha256, files_sha256
from atp_edge.run.pinned import PROTECT, SOURCES, pinned_settings, read_inputs
from atp_edge.settings import with_values
from atp_edge.training.setup import hub_id_of, model_source

# Of a checkpoint's folder, the files that are read, by what reads them.
TEMPLATE = ("chat_template*", "additional_chat_templates/*")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
             "*.model", "*.tiktoken")  # fmt: skip
MODEL = ("*.json", "*.safetensors", "*.py")
PACKAGE_OF = {"legal": "licensedcode-data", "health": "simple-icd-10-cm"}
"""The package that holds a built-in domain."""


def anchored(config: Config) -> Config:
    """These settings with the whole path of each file and folder that they name, so that a run goes
    on from any directory; `out` is where config.toml lies."""
    local = hub_id_of(config.model) is None and config.model != "demo"
    named = {
        "model": config.model if local else "",
        "data": "" if config.data in PACKAGE_OF else config.data,
        "protect": "" if config.protect in PACKAGE_OF else config.protect,
        "gate.config": config.gate.config,
    }
    # No symbolic link is followed: what it points to may move.
    whole = {key: str(Path(path).absolute()) for key, path in named.items() if path}
    return with_values(config, whole)


def inputs_of(config: Config) -> dict[str, Any]:
    """What a run of these settings begins with, for inputs.json (see atp_edge.run.pinned).

    Raises ValueError, or OSError, when model or data are not there.
    """
    folder = model_source(config.model)
    hub = config.model != "demo" and folder != Path(config.model)
    commit = folder.name if hub else None  # The Hub's cache names a snapshot by its commit.
    return {
        "settings": pinned_settings(config),
        **{
            kind: {
                "source": str(folder) if commit is None else config.model,
                "files": files_sha256(folder, names),
            }
            for kind, names in _kinds(folder).items()
        },
        "data": _text("data", config.data),
        **({PROTECT: _text(PROTECT, config.protect)} if config.protect else {}),
        "model_commit": commit,
    }


def provenance_of(run: RunFolder) -> dict[str, str]:
    """What a manifest says of what the run began with; nothing where it was never recorded."""
    inputs = read_inputs(run.path)
    if inputs is None:
        return {}
    found = {
        f"{kind}_sha256": combined_sha256(inputs[kind]["files"])
        for kind in SOURCES
        if inputs[kind]["files"]
    }
    data = inputs["data"].get("package") or Path(inputs["data"]["source"]).name
    commit = inputs["model_commit"]
    return found | {"data": data} | ({"model_commit": commit} if commit else {})


def _kinds(folder: Path) -> Mapping[str, list[str]]:
    """Names of the files in a checkpoint's folder, each under the first of what reads it."""
    kinds: dict[str, list[str]] = {"template": [], "tokenizer": [], "model": []}
    patterns = dict(zip(kinds, (TEMPLATE, TOKENIZER, MODEL), strict=True))
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        reader = next((k for k in kinds if any(fnmatch(name, p) for p in patterns[k])), None)
        if reader:
            kinds[reader].append(name)
    return kinds


def _text(setting: str, source: str) -> dict[str, Any]:
    if source in PACKAGE_OF:
        package = PACKAGE_OF[source]
        return {"source": source, "files": {}, "package": f"{package} {version(package)}"}
    check_text(setting, source)
    return {"source": source, "files": files_sha256(Path(source), ["."])}


def check_text(setting: str, source: str) -> None:
    """Raise ValueError for a source that is no built-in domain and lies nowhere."""
    if source not in PACKAGE_OF and not Path(source).exists():
        domains = ", ".join(PACKAGE_OF)
        raise ValueError(
            f"{setting} {source!r}: no such file; expected {domains}, or a file or folder"
        )
