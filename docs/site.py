"""mkdocs' hook: pages and files beside docs/ are part of the site, and links to them lead there.

The pages are written to be read in the repository as well; only here their links are turned.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = "repository"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
REFERENCE = """

## Reference

::: atp_edge.api
    options: {members_order: source, show_root_heading: false}
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root, and every file beside docs/ that a page links to."""
    sources = [*(ROOT / page for page in PAGES), *(ROOT / "docs").rglob("*.md")]
    for page in PAGES:
        files.append(_file(page, config))
    linked = {target for source in sources for target in _targets(source)}
    for target in sorted(linked):
        if not target.startswith("docs/") and target not in PAGES and (ROOT / target).is_file():
            files.append(_file(target, config))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that lead out of docs/; a folder has no page, so its name stays as text."""
    here = posixpath.dirname(page.file.src_uri)
    source = page.file.src_uri
    inside = source.startswith(f"{BESIDE}/")
    repository = source.removeprefix(f"{BESIDE}/") if inside else f"docs/{source}"

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(repository), match[1]))
        if (ROOT / target).is_dir():
            return f"](# '{target}/ in the repository')"
        place = target.removeprefix("docs/") if target.startswith("docs/") else f"{BESIDE}/{target}"
        return f"]({posixpath.relpath(place, here or '.')}{match[2] or ''})"

    return LINK.sub(turned, markdown) + (REFERENCE if source == "api.md" else "")


def _targets(source: Path) -> set[str]:
    """What a page links to, by paths in the repository."""
    folder = source.parent.relative_to(ROOT).as_posix()
    text = source.read_text(encoding="utf-8")
    return {posixpath.normpath(posixpath.join(folder, match[1])) for match in LINK.finditer(text)}


def _file(path: str, config: Any) -> File:
    return File.generated(config, f"{BESIDE}/{path}", abs_src_path=str(ROOT / path))
