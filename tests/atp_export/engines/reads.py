"""What a class of an engine reads of a model's configuration, found in its source.

Followed from a class to all that it names: its bases, the classes that it builds, functions of the
same file and of the files beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONFIGS = {"config", "hf_config", "text_config", "hf_text_config"}
TABLES = {"hparams"}
SKIPPED = {"PretrainedConfig", "PreTrainedConfig"}
KINDS = ("condition", "always", "asked")


@dataclass(frozen=True, order=True)
class Read:
    """A key and where it stands. key: several that say the same are joined by |. kind: `always`
    read; under a `condition`, mostly another key; `asked` for, with a default."""

    key: str
    file: str
    line: int
    kind: str


@dataclass(frozen=True)
class Source:
    """The files of an engine's models: root/folder/*.py; package: how they import each other."""

    root: Path
    folder: str
    package: str


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _defined(path: Path) -> dict[str, ast.AST]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name: node for node in _tree(path).body if isinstance(node, kinds)}


@cache
def _imported(path: Path, package: str) -> dict[str, tuple[Path, str]]:
    """(file beside it, name there) of every name taken from one."""
    found = {}
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        module = node.module if node.level == 1 else node.module.removeprefix(f"{package}.")
        beside = path.parent / f"{module.replace('.', '/')}.py"
        if (node.level == 1 or module != node.module) and beside.is_file():
            found |= {a.asname or a.name: (beside, a.name) for a in node.names}
    return found


def reads_of(source: Source, file: str, name: str, *, methods: Sequence[str] = ()) -> list[Read]:
    """The first place of every key that a class of folder/file reads. methods: only these, of the
    class and its bases."""
    found: dict[str, Read] = {}
    path = source.root / source.folder / file
    for at, node in _reached(source, path, name, bases_alone=bool(methods)):
        body = node.body if isinstance(node, ast.ClassDef) else []
        parts = [n for n in body if getattr(n, "name", "") in methods] if methods else [node]
        for part in parts:
            for key, line, kind in _keys(part):
                old = found.get(key)
                # A key that is asked for somewhere is there or not: what reads it plainly asked.
                if old is None or KINDS.index(kind) > KINDS.index(old.kind):
                    found[key] = Read(key, str(at.relative_to(source.root)), line, kind)
    return sorted(found.values())


def _reached(
    source: Source, path: Path, name: str, *, bases_alone: bool
) -> Iterator[tuple[Path, ast.AST]]:
    waiting, seen = [(path, name)], set()
    while waiting:
        path, name = waiting.pop(0)
        node = _defined(path).get(name)
        if node is None or (path, name) in seen:
            continue
        seen.add((path, name))
        yield path, node
        named = node.bases if bases_alone and isinstance(node, ast.ClassDef) else [node]
        names = {n.id for part in named for n in ast.walk(part) if isinstance(n, ast.Name)}
        for other in sorted(names - SKIPPED):
            waiting.append(_imported(path, source.package).get(other, (path, other)))


def _keys(node: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(key, line, kind) of all reads under a node."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    stored = {id(t) for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets}
    for n, conditional in _walk(node, conditional=False):
        plain = "condition" if conditional else "always"
        if isinstance(n, ast.Attribute) and _last(n.value) in CONFIGS:
            if not {id(n)} & (called | stored) and not n.attr.startswith("_"):
                yield n.attr, n.lineno, plain
        elif isinstance(n, ast.Call):
            for key in _asked(n):
                yield key, n.lineno, plain if _must(n) else "asked"
        elif isinstance(n, ast.Subscript) and _last(n.value) in TABLES and id(n) not in stored:
            for key in _texts(n.slice):
                yield key, n.lineno, plain
        elif isinstance(n, ast.Compare) and _last(n.comparators[0]) in TABLES:
            for key in _texts(n.left):
                yield key, n.lineno, "asked"


BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.Try)


def _walk(node: ast.AST, *, conditional: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it lies in a branch."""
    yield node, conditional
    for child in ast.iter_child_nodes(node):
        first = node.test if isinstance(node, ast.If | ast.IfExp) else None
        within = isinstance(node, BRANCHES) and child is not first
        yield from _walk(child, conditional=conditional or within)


def _asked(call: ast.Call) -> list[str]:
    """Keys of getattr(config, k), hasattr(config, k), hparams.get(k), find_hparam([k, ...])."""
    name = _last(call.func)
    if name in ("getattr", "hasattr") and _last(call.args[0]) in CONFIGS:
        return _texts(call.args[1])
    if name == "get" and isinstance(call.func, ast.Attribute) and _last(call.func.value) in TABLES:
        return _texts(call.args[0])
    return ["|".join(_texts(call.args[0]))] if name == "find_hparam" else []


def _must(call: ast.Call) -> bool:
    """find_hparam without `optional`."""
    return _last(call.func) == "find_hparam" and not call.keywords and len(call.args) == 1


def _texts(node: ast.AST) -> list[str]:
    parts = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
    return [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


def _last(node: ast.AST) -> str:
    """`hf_config` of self.model.hf_config."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
