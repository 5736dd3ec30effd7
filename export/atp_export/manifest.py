"""Where a shipped folder comes from, and the proof that it is still what was shipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from atp_edge.run.files import write_atomically

MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, metadata: Mapping[str, str]) -> None:
    """manifest.json: the provenance, and the SHA-256 and size of every file of the folder."""
    files = {
        str(path.relative_to(folder)): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = {"schema": 1, "provenance": dict(metadata), "files": files}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def verify_manifest(folder: Path) -> dict[str, str]:
    """The provenance of a shipped folder. Raises ValueError naming the first file that differs."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no {MANIFEST}: it was not written by `atp-edge export`")
    manifest = json.loads(path.read_text())
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise ValueError(f"{file} is missing; the manifest lists it: ship the folder again")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(
                f"{file} ({file.stat().st_size} bytes) is not what was shipped "
                f"({expected['bytes']} bytes, SHA-256 {expected['sha256'][:12]}…): ship it again"
            )
    provenance: dict[str, str] = manifest["provenance"]
    return provenance
