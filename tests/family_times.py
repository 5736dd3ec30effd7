"""docs/families.md: what is tested of every family, and for how long; from pytest's own records.

The page names the commands that write it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.tiny import FAMILIES, NEW_FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
CHECKS = {
    "masked = narrow": ("test_masked_equals_narrow",),
    "narrow = ONNX": ("test_narrow_equals_onnx",),
    "ONNX's reference": ("test_the_file_means_the_model",),
    "PyTorch = llama.cpp": ("test_llama_cpp_agrees",),
    "train, ship, reload": ("test_a_family_is_trained", "test_a_family_ships", "test_gemma_3_is"),
}
"""What the names of tests begin with."""
HEAD = """\
# What is tested of every family

Tiny random models, by the names of `tests/tiny.py`; a family is one line there
([CONTRIBUTING.md](../CONTRIBUTING.md#add-a-family)). `narrow = ONNX` is every flavour, precision
and widths policy; ONNX's reference is onnx's own ReferenceEvaluator, on `standard` and `portable`;
llama.cpp is asked where a family has a GGUF ([gguf.md](gguf.md)). `3 in 2` is 3 tests in
2 seconds: those of `make test`, and behind a `+` those that `make test-large` adds.

Written by

    OMP_NUM_THREADS=1 python -m pytest FILES --junitxml=short.xml
    OMP_NUM_THREADS=1 python -m pytest FILES -m large --junitxml=large.xml
    python -m tests.family_times short.xml large.xml

where FILES are `tests/atp_export/test_families.py`, `tests/atp_export/test_onnx.py`,
`tests/atp_export/gguf/test_families.py`, `tests/atp_edge/model/test_narrow.py` and
`tests/atp_edge/pipeline/test_every_family.py`. Seconds of one thread, while others used
the machine's two cores too: so long at most.
"""


@dataclass
class Ran:
    """Tests and their seconds."""

    count: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.count} in {self.seconds:.0f}"


def family_of(name: str) -> str | None:
    """The family that a test's parameters begin with."""
    if name.startswith("test_gemma_3_is"):
        return "gemma3"
    _, _, rest = name.partition("[")
    known = sorted({**FAMILIES, **NEW_FAMILIES}, key=len, reverse=True)
    return next((f for f in known if rest.startswith((f"{f}-", f"{f}]"))), None)


def counted(record: Path) -> dict[tuple[str, str], Ran]:
    """By family and check, of tests that passed. Raises ValueError where one failed."""
    found: defaultdict[tuple[str, str], Ran] = defaultdict(Ran)
    for case in ElementTree.parse(record).iter("testcase"):
        name = case.get("name", "")
        if case.find("failure") is not None or case.find("error") is not None:
            raise ValueError(f"{record}: {name} failed")
        family = family_of(name)
        check = next((check for check, begins in CHECKS.items() if name.startswith(begins)), None)
        if family and check and case.find("skipped") is None:
            ran = found[family, check]
            ran.count, ran.seconds = ran.count + 1, ran.seconds + float(case.get("time", 0))
    return dict(found)


def render(short: dict[tuple[str, str], Ran], large: dict[tuple[str, str], Ran]) -> str:
    """The page."""

    def cell(family: str, check: str) -> str:
        own, more = short.get((family, check)), large.get((family, check))
        return f"{own or ''}{f' + {more}' if more else ''}".strip() or "-"

    def total(ran: dict[tuple[str, str], Ran]) -> str:
        values = ran.values()
        return str(Ran(sum(r.count for r in values), sum(r.seconds for r in values)))

    rows = [[f, *(cell(f, check) for check in CHECKS)] for f in [*FAMILIES, *NEW_FAMILIES]]
    table = [f"| {' | '.join(row)} |" for row in (["family", *CHECKS], ["---"] * 6, *rows)]
    both = f"{total(short)} seconds in `make test`, {total(large)} more in `make test-large`"
    return "\n".join([HEAD, *table, "", f"Together {both}.", ""])


if __name__ == "__main__":
    PAGE.write_text(render(*(counted(Path(record)) for record in sys.argv[1:3])))
