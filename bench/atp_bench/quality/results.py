"""What cells gave: a file that grows by one cell at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atp_bench.quality.cells import Cell
from atp_edge.run.environment import environment
from atp_edge.run.files import file_lock, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell gave, on the test split.

    recovery: dense over slim perplexity. tasks: slim over dense of every task, their mean as the
    paper takes it with its 95 % interval over items, and the mean above chance. block_losses: nats
    a token of every test block, by which two results are compared in pairs. seconds: of the
    training, from its last kill on. items: of every task, blocks: of the test split, at most.
    precision: what training computed in (`train.precision`).
    """

    cell: Cell
    dense_perplexity: float
    perplexity_at_freeze: float
    perplexity: float
    recovery: float
    tasks: dict[str, Any]
    decoder_share: float
    whole_share: float
    tokens: int
    seconds: float
    items: int = 50
    blocks: int = 40
    block_losses: Sequence[float] = ()
    dense_block_losses: Sequence[float] = ()
    precision: str = "bf16"

    @property
    def where(self) -> str:
        """All of the cell but its method and seed, for a heading."""
        c = self.cell
        place = f"{c.domain}, {1 - c.share:.0%} cut, {c.widths}, {self.tokens:,} tokens"
        place += ", fp32" if self.precision == "no" else ""
        return f"{place} of {c.documents:,} documents" if c.documents else place

    def beside(self, other: Result) -> bool:
        """Whether only the method differs: the same data, seed, budget, steps, test blocks and
        precision."""
        same_cell = replace(self.cell, method=other.cell.method) == other.cell
        alike = same_cell and self.precision == other.precision
        return alike and len(self.block_losses) == len(other.block_losses)


def read_results(path: Path) -> dict[str, Result]:
    """Results by their cells' keys; none when there is no file."""
    rows = read_json(path).get("results", [])
    made = [Result(**row | {"cell": Cell(**row["cell"])}) for row in rows]
    return {result.cell.key: result for result in made}


def write_results(path: Path, found: Mapping[str, Result]) -> None:
    rows = [asdict(r) for r in found.values()]
    write_json(path, {"environment": environment(), "results": rows})


def add_result(path: Path, made: Result) -> None:
    """Put a cell's result into a file that other processes add to as well."""
    with file_lock(path, waiting=lambda: None):
        write_results(path, read_results(path) | {made.cell.key: made})
