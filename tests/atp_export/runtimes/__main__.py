"""What loads where: every runtime that is at hand, given real text.

`python -m tests.atp_export.runtimes` runs every cell that docs/runtimes.json has not yet, writes it
after each model, and docs/runtimes.md in the end. A runtime of another version than the file's runs
all of its cells again; so do all where the file is gone. ATP_NODE_FOLDER, ATP_NODE_FOLDER_LARGE and
ATP_OPTIMUM_PYTHON name what `make test` and `make test-large` install under build/.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atp_export.gguf.llama_cpp import node_folder

from tests.atp_export.runtimes.ask import OWN, RUNTIMES, node_package
from tests.atp_export.runtimes.cells import (
    GGUF,
    MARKS,
    NEW_TOKENS,
    Cell,
    all_cells,
    export_cell,
    passages,
)
from tests.atp_export.runtimes.judge import Outcome, try_gguf, try_onnx
from tests.atp_export.runtimes.page import LLAMA_CPP, PAGE, RESULTS, render


def _before() -> dict[str, Any]:
    """What is known, without the cells of runtimes of which another version is at hand now."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runtimes": {}}
    node = node_folder()
    llama_cpp = node_package(node, "node-llama-cpp") if node else None
    here = {name: (r.version(), r.tokenizer) for name, r in RUNTIMES.items()}
    here[LLAMA_CPP] = (llama_cpp and f"of node-llama-cpp {llama_cpp}", OWN)
    runtimes = {}
    for name, (version, tokenizer) in here.items():
        old = known["runtimes"].get(name)
        if version is None and old is None:
            continue
        same = old is not None and version in (None, old["version"])
        fresh = {"version": version, "tokenizer": tokenizer, "cells": {}}
        runtimes[name] = (old if same else fresh) | {"tokenizer": tokenizer}
    return {"date": "", "texts": len(MARKS), "new_tokens": NEW_TOKENS, "runtimes": runtimes}


def main() -> None:
    results = _before()
    for cell in all_cells():
        found = _gguf(cell, results) if cell.flavour == GGUF else _onnx(cell, results)
        _keep(results, str(cell), found)
    PAGE.write_text(render(results))


def _gguf(cell: Cell, results: dict[str, Any]) -> dict[str, Outcome]:
    llama_cpp = results["runtimes"].get(LLAMA_CPP)
    if llama_cpp is None or str(cell) in llama_cpp["cells"] or node_folder() is None:
        return {}
    return {LLAMA_CPP: try_gguf(cell, passages())}


def _onnx(cell: Cell, results: dict[str, Any]) -> dict[str, Outcome]:
    """Of the runtimes that have not been asked."""
    asked = [
        runtime
        for name, runtime in RUNTIMES.items()
        if name in results["runtimes"]
        and str(cell) not in results["runtimes"][name]["cells"]
        and cell.flavour in runtime.flavours
        and runtime.version() is not None
    ]
    if not asked:
        return {}
    with tempfile.TemporaryDirectory() as root:
        folder = export_cell(cell, Path(root))
        return {r.name: try_onnx(cell, folder, r.ask, passages()) for r in asked}


def _keep(results: dict[str, Any], cell: str, found: dict[str, Outcome]) -> None:
    if not found:
        return
    for name, outcome in found.items():
        results["runtimes"][name]["cells"][cell] = asdict(outcome)
        sys.stdout.write(f"{cell} {name}: {outcome.says} ({outcome.seconds} s)\n")
    sys.stdout.flush()
    results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
