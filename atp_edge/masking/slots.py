"""Where structures lie in the narrow buffers of a site, from decision to decision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EMPTY = -1
"""A slot without a structure: its rows are zero."""


def quantum_of(size: int) -> int:
    """Slots come by so many: a width that moves a little then moves no other structure's rows. At
    most a 64th of a site is empty, and 128 slots are a tile of a product."""
    return max(1, min(128, size // 64))


def placed(live: Iterable[int], before: Sequence[int] | None, quantum: int) -> list[int]:
    """Structures by slot, `EMPTY` where there is none; slots are a multiple of the quantum.

    before: the slots until now. Who stays keeps its slot; who is new takes the first empty one.
    Where much has become empty, or before is None, all stand in their order.
    """
    wanted = sorted(live)
    least = -(-len(wanted) // quantum) * quantum
    if before is None or len(before) >= least + 3 * quantum:
        return wanted + [EMPTY] * (least - len(wanted))
    staying = set(wanted)
    slots = [s if s in staying else EMPTY for s in before]
    slots += [EMPTY] * (least - len(slots))
    new = iter(sorted(staying.difference(slots)))
    return [next(new, EMPTY) if s == EMPTY else s for s in slots]
