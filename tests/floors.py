"""The lowest versions that pyproject.toml declares: `python tests/floors.py` prints them for pip.

torch's is left out: at its floor (and at every version but the one of the Makefile) pip brings
several GB of CUDA packages with it.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("cpu",)


def floors(text: str) -> list[str]:
    """`name==lowest` of every dependency of a pyproject.toml and of the extras tested here."""
    project = tomllib.loads(text)["project"]
    extras = [x for name in EXTRAS for x in project["optional-dependencies"][name]]
    found = []
    for requirement in project["dependencies"] + extras:
        named = re.fullmatch(r"([\w.-]+)(?:>=|==)([\w.]+)", requirement)
        if named is None:
            raise ValueError(f"{requirement!r}: expected NAME>=VERSION")
        if named[1] != "torch":
            found.append(f"{named[1]}=={named[2]}")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors(PYPROJECT.read_text(encoding="utf-8"))) + "\n")
