"""The recorded hour of a new user: the page holds what the script types now."""

from __future__ import annotations

import runpy
from typing import Any

from tests.test_docs import ROOT

SCRIPT, PAGE = ROOT / "examples" / "first_hour.py", ROOT / "docs" / "first-hour.md"


def test_the_page_holds_what_the_script_types_in_its_order() -> None:
    script: dict[str, Any] = runpy.run_path(str(SCRIPT))
    page, place = PAGE.read_text(), 0
    assert "python examples/first_hour.py --steps 40`" in page
    run = f"{script['RUN'].format(model='demo', steps=40)} {script['SMALL']}"
    for heading, played in script["scenes"](run):
        for text in (f"\n## {heading}\n", *(f"\n$ {x}\n" for scene in played for x in scene.types)):
            place = page.find(text, place)
            assert place >= 0, text
