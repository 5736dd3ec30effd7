"""What vLLM, SGLang and llama.cpp's converter read of config.json, family by family.

`python -m tests.atp_export.engines.table FOLDER` writes docs/engines.json and docs/engines.md from
the sources in FOLDER (see sources.py).
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from atp_edge.model.families import FAMILIES
from tests.atp_export.engines.page import render
from tests.atp_export.engines.reads import Read, Source, reads_of
from tests.atp_export.engines.sources import VERSIONS

ROOT = Path(__file__).parents[3]
RESULTS, PAGE = ROOT / "docs" / "engines.json", ROOT / "docs" / "engines.md"
Found = dict[str, tuple[str, str, int]]
"""architecture -> (file in the folder of models, class, line that names it there)."""
TRANSFORMERS = "transformers"
"""The engine runs transformers' own class."""


def vllm(root: Path) -> dict[str, Any]:
    source = Source(root, "vllm/model_executor/models", "vllm.model_executor.models")
    tree = ast.parse((root / source.folder / "registry.py").read_text(encoding="utf-8"))
    found: Found = {}
    for table in (n for n in ast.walk(tree) if isinstance(n, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            pair = [e.value for e in getattr(value, "elts", []) if isinstance(e, ast.Constant)]
            if isinstance(key, ast.Constant) and len(pair) == 2:
                found.setdefault(str(key.value), (f"{pair[0]}.py", str(pair[1]), key.lineno))
    for name, (file, _, line) in found.items():
        if file == "transformers.py":
            found[name] = (TRANSFORMERS, "", line)
    common = reads_of(
        Source(root, "vllm/transformers_utils", "vllm.transformers_utils"),
        "model_arch_config_convertor.py", "ModelArchConfigConvertorBase",
        methods=("get_per_layer_hf_configs", "get_total_num_attention_heads", "get_hidden_size",
                 "get_head_size", "get_num_hidden_layers", "get_vocab_size"),
    )  # fmt: skip
    return _families(source, found, "registry.py") | {"every model": _rows(common)}


def sglang(root: Path) -> dict[str, Any]:
    source = Source(root, "sglang/srt/models", "sglang.srt.models")
    found: Found = {}
    for path in sorted((root / source.folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
                for name in (n for n in ast.walk(node.value) if isinstance(n, ast.Name)):
                    found[name.id] = (path.name, name.id, name.lineno)
    common = reads_of(
        Source(root, "sglang/srt/configs", "sglang.srt.configs"), "model_config.py", "ModelConfig",
        methods=("_derive_model_shapes",),
    )  # fmt: skip
    shared = [read for read in common if read.key in ("head_dim", "num_attention_heads")]
    return _families(source, found, "") | {"every model": _rows(shared)}


def llama_cpp(root: Path) -> dict[str, Any]:
    source = Source(root, "conversion", "conversion")
    found: Found = {}
    for path in sorted((root / source.folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in (c for c in getattr(node, "decorator_list", []) if isinstance(c, ast.Call)):
                if getattr(call.func, "attr", "") == "register" and isinstance(node, ast.ClassDef):
                    for name in (a for a in call.args if isinstance(a, ast.Constant)):
                        found.setdefault(str(name.value), (path.name, node.name, name.lineno))
    methods = ("__init__", "set_gguf_parameters", "modify_tensors", "generate_extra_tensors")
    return _families(source, found, "", methods=methods)


def _families(
    source: Source, found: Found, registry: str, methods: tuple[str, ...] = ()
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for family in sorted(FAMILIES):
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        file, name, line = found.get(architecture, ("", "", 0))
        named = f"{source.folder}/{registry or file}:{line}" if line else None
        row: dict[str, Any] = {"architecture": architecture, "named": named}
        if file in ("", TRANSFORMERS):
            rows[family] = row | {"class": None}
            continue
        reads = reads_of(source, file, name, methods=methods)
        rows[family] = row | {"class": f"{source.folder}/{file}:{name}", "reads": _rows(reads)}
    return rows


def _rows(reads: list[Read]) -> dict[str, str]:
    return {read.key: f"{read.file}:{read.line} {read.kind}" for read in reads}


ENGINES = {"vllm": vllm, "sglang": sglang, "llama-cpp-python": llama_cpp}


def table(folder: Path) -> dict[str, Any]:
    """Of the sources in a folder."""
    return {
        name: {"version": VERSIONS[name], "families": read(folder / name)}
        for name, read in ENGINES.items()
    }


if __name__ == "__main__":
    results = table(Path(sys.argv[1]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(results))
