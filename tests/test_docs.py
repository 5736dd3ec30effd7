"""The documents name what exists: links, paths, modules, commands, flags, and every source file."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from atp_edge.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = ("atp_edge", "kernels", "export", "bench")
BESIDE = ("tests", "docs", "examples")
# Where each import package lies.
PACKAGES = {
    "atp_edge": ROOT / "atp_edge",
    "atp_kernels": ROOT / "kernels" / "atp_kernels",
    "atp_export": ROOT / "export" / "atp_export",
    "atp_bench": ROOT / "bench" / "atp_bench",
}
# A changelog names modules that are gone.
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def spans(text: str) -> list[str]:
    """What stands in backticks, outside fenced blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


def exists(module: str) -> bool:
    """Whether a dotted name is a module of ours, or something that one defines."""
    package, *parts = module.split(".")
    at = PACKAGES[package]
    for i, part in enumerate(parts):
        if (at / part).is_dir():
            at = at / part
            continue
        file = at / f"{part}.py"
        inside = parts[i + 1 :] if file.is_file() else parts[i:]
        file = file if file.is_file() else at / "__init__.py"
        return not inside or re.search(rf"\b{inside[0]}\b", file.read_text()) is not None
    return True


@pytest.mark.parametrize("page", OF_TODAY, ids=named)
def test_every_path_and_module_in_backticks_exists(page: Path) -> None:
    lost = []
    for span in spans(page.read_text()):
        path = re.fullmatch(rf"(?:{'|'.join((*CODE, *BESIDE))})/[\w./-]*", span)
        module = re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", span)
        if (path and not (ROOT / span).exists()) or (module and not exists(span)):
            lost.append(span)
    assert not lost


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def flags_of(command: Any) -> set[str]:
    return {"--help"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}


def all_flags(command: Any) -> set[str]:
    below = getattr(command, "commands", {}).values()
    return flags_of(command).union(*map(all_flags, below))


def invocations(text: str) -> Iterator[list[str]]:
    """The words behind `atp-edge`, of every command in backticks or in a block; of a console's
    block, of what was typed."""
    text = re.sub(r"^```console\n(.*?)^```", _typed, text, flags=re.M | re.S)
    blocks = re.findall(r"^(?:```\w*\n(.*?)^```|((?: {4}.*\n)+))", text, flags=re.M | re.S)
    lines = "".join(a or b for a, b in blocks).replace("\\\n", " ").splitlines()
    for line in (*lines, *(" ".join(s.split()) for s in spans(text))):
        called = re.search(r"(?:^|\s|/)atp-edge\s+(.*)", line)
        if called:
            yield shlex.split(called[1], comments=True)


def _typed(console: re.Match[str]) -> str:
    lines = [line[2:] for line in console[1].splitlines(keepends=True) if line.startswith("$ ")]
    return "".join(("```\n", *lines, "```"))


def lost_in(words: list[str]) -> list[str]:
    """Commands and flags of one invocation that the command line does not have."""
    command = command_line()
    for word in words:
        below = getattr(command, "commands", {})
        if word.startswith("-") or not below:
            break
        if word not in below:
            return [word]
        command = below[word]
    known = flags_of(command)
    return [w for w in words if w.startswith("--") and w.partition("=")[0] not in known]


@pytest.mark.parametrize("page", OF_TODAY, ids=named)
def test_every_command_and_its_flags_exist(page: Path) -> None:
    text = page.read_text()
    assert not [(words, lost) for words in invocations(text) for lost in lost_in(words)]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/recovery.md"])
def test_every_flag_in_backticks_is_one_of_ours(page: str) -> None:
    alone = [s for s in spans((ROOT / page).read_text()) if s.startswith("--")]
    told = {w for span in alone for w in span.split() if w.startswith("--")}
    assert told <= all_flags(command_line())


def test_what_is_not_there_is_noticed() -> None:
    assert lost_in(["run", "--recpie", "fast"]) == ["--recpie"]
    assert lost_in(["shrnik", "--out", "RUN"]) == ["shrnik"]
    assert lost_in(["bench", "qualty"]) == ["qualty"]
    assert lost_in(["bench", "quality", "--preset", "cpu"]) == []
    assert lost_in(["bench", "--batch", "8"]) == []
    assert not exists("atp_edge.approach")
    assert exists("atp_edge.model.plan.Plan")
    assert anchors(ROOT / "CONTRIBUTING.md") >= {"add-a-family", "set-up"}


def sources() -> set[str]:
    """Every source file of ours; of `__init__.py` those that hold more than a docstring."""
    found = set()
    for top in CODE:
        for path in (ROOT / top).rglob("*"):
            package_alone = path.name == "__init__.py" and (
                len(ast.parse(path.read_text()).body) <= 1
            )
            if path.suffix in (".py", ".jinja") and not package_alone:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_architecture_has_a_line_for_every_source_file_and_for_no_other() -> None:
    folder, told = "", []
    for line in ARCHITECTURE.read_text().splitlines():
        if heading := re.fullmatch(r"## `(.+/)`", line):
            folder = heading[1]
        elif row := re.match(r"\| `([\w.]+)` \|", line):
            told.append(folder + row[1])
    assert sorted(told) == sorted(sources())


def test_architecture_names_functions_classes_and_rooms_that_exist() -> None:
    ways, _, _ = ARCHITECTURE.read_text().partition("\n## `")
    code = "\n".join((ROOT / file).read_text() for file in sources())
    known = {*re.findall(r"\b(?:def|class) (\w+)", code), *(Path(f).stem for f in sources())}
    known |= {Path(f).parent.name for f in sources()}
    told = [s for s in spans(ways) if re.fullmatch(r"[A-Za-z_]\w+(\.[a-z_]+)?", s)]
    files = (".py", ".json", ".toml")
    names = {part for s in told if not s.endswith(files) for part in s.split(".")}
    assert "set_decision" in names
    assert names <= known


def test_the_picture_is_silent_and_says_what_the_browser_said_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [sys.executable, str(ROOT / "docs" / "picture.py"), str(tmp_path), "page.png"]
    browser = tmp_path / "chromium"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "report.html").touch()

    def shown(*lines: str) -> tuple[int, str]:
        browser.write_text("\n".join(["#!/bin/sh", "echo its own noise >&2", *lines]))
        browser.chmod(0o755)
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "page.png").write_text("of before")
    for code in (0, 3):
        said = f"{browser} ended with {code} and no picture:\nits own noise\n\n"
        assert shown(f"exit {code}") == (1, said)
    assert (tmp_path / "page.png").read_text() == "of before"
    writes = 'for x; do case "$x" in --screenshot=*) printf new > "${x#*=}";; esac; done'
    assert shown(writes) == (0, "")
    assert (tmp_path / "page.png").read_text() == "new"
