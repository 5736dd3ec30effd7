"""A step's forward and backward pass, replayed from a CUDA graph while nothing but numbers changes.

The host gives a GPU some thousand launches a step; a replay is one. What a graph fixes is what must
not move: addresses, shapes, and what the host decided on the way. So a part of a step is replayed
only if it has the shapes of the one captured, and `reset` forgets all graphs when the decision
moves. Inputs are copied to where the graph reads them; gradients lie where it wrote them.

The first part of a kind runs as ever (kernels are compiled and buffers gathered then); the second
is captured beside it, and the graph taken only if its first replay gives the same loss and
gradients. Where that fails, or capture does, steps run as ever from then on, and the log says why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from atp_edge.data.blocks import Blocks
from atp_edge.run import ranks

logger = logging.getLogger(__name__)
Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Captures what work gives the device to do, and returns its replay. Raises RuntimeError."""
LEAST_REPLAYS = 2
"""Steps that a graph must be of use for: its capture takes the host as long as a step."""
LARGEST_DIFFERENCE = 1e-2
"""Of a gradient's norm, between a replay and the step: sums may be in another order."""


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A graph, where it reads and where it writes."""

    replay: Work
    blocks: Blocks
    share: Tensor
    plain: Tensor
    gradients: dict[Tensor, Tensor]


class StepGraphs:
    """Gradients of a part of a step, by a graph where one fits."""

    def __init__(self, parameters: Iterable[Tensor], record: Record | None) -> None:
        """record: none where nothing is captured."""
        self.parameters, self._record = list(parameters), record
        self._seen: set[Hashable] = set()
        self._held: dict[Hashable, _Captured] = {}

    def reset(self) -> None:
        """The decision has moved: no graph is right any more."""
        self._seen.clear()
        self._held.clear()

    def gradients(
        self,
        blocks: Blocks,
        share: float,
        run: Callable[[Blocks, float | Tensor], Tensor],
    ) -> Tensor:
        """run(blocks, share) adds its gradients to the parameters' and returns a loss; so does
        this."""
        key = (tuple(blocks.input_ids.shape), len(blocks.places()))
        if key in self._held:
            return self._replayed(self._held[key], blocks, share)
        if self._record is None or key not in self._seen:
            self._seen.add(key)
            return run(blocks, share)
        before = self._taken()
        plain = run(blocks, share)
        now = self._taken()
        captured = self._capture(blocks, share, run)
        if captured is not None and self._same(captured, blocks, share, plain, now):
            self._held[key] = captured
        self._give([before, now])
        return plain

    def _capture(
        self, blocks: Blocks, share: float, run: Callable[[Blocks, float | Tensor], Tensor]
    ) -> _Captured | None:
        assert self._record is not None
        device = blocks.input_ids.device
        held = Blocks(
            input_ids=blocks.input_ids.clone(),
            labels=blocks.labels.clone(),
            predicting=blocks.places().clone(),
        )
        at, plain = torch.full((), share, device=device), torch.zeros((), device=device)

        def work() -> None:
            plain.copy_(run(held, at))

        try:
            replay = self._record(work)
        except RuntimeError as error:
            self._refuse(str(error).partition("\n")[0])
            self._taken()
            return None
        return _Captured(replay=replay, blocks=held, share=at, plain=plain, gradients=self._taken())

    def _same(
        self,
        captured: _Captured,
        blocks: Blocks,
        share: float,
        plain: Tensor,
        now: dict[Tensor, Tensor],
    ) -> bool:
        found = float(self._replayed(captured, blocks, share))
        gradients = self._taken()
        apart = [
            float((gradients[p] - g).norm() / g.norm().clamp_min(1e-30))
            for p, g in now.items()
            if p in gradients
        ]
        same = gradients.keys() == now.keys() and max(apart, default=0.0) <= LARGEST_DIFFERENCE
        if not same or not math.isclose(found, float(plain), rel_tol=LARGEST_DIFFERENCE):
            self._refuse("its replay did not give the step's loss and gradients")
            return False
        return True

    def _replayed(self, captured: _Captured, blocks: Blocks, share: float) -> Tensor:
        captured.blocks.input_ids.copy_(blocks.input_ids)
        captured.blocks.labels.copy_(blocks.labels)
        assert captured.blocks.predicting is not None
        captured.blocks.predicting.copy_(blocks.places())
        captured.share.fill_(share)
        held = captured.gradients
        # What a replay left on a parameter lies where this one writes.
        before = {p: g.clone() if held.get(p) is g else g for p, g in self._taken().items()}
        captured.replay()
        self._give([before, held])
        return captured.plain.clone()

    def _taken(self) -> dict[Tensor, Tensor]:
        """The gradients, off their parameters."""
        found = {p: p.grad for p in self.parameters if p.grad is not None}
        for p in found:
            p.grad = None
        return found

    def _give(self, gradients: list[dict[Tensor, Tensor]]) -> None:
        """Add them to the parameters', never in place."""
        for each in gradients:
            for p, g in each.items():
                p.grad = g if p.grad is None else p.grad + g

    def _refuse(self, reason: str) -> None:
        logger.warning("steps are not captured as CUDA graphs: %s", reason)
        self._record = None


def step_graphs(
    parameters: Iterable[Tensor], device: torch.device, *, stands_for: float, fp16: bool
) -> StepGraphs:
    """Graphs where they can be: on one CUDA device, without a gradient scaler (its steps are the
    host's to skip), while what is computed stands for so many steps."""
    able = device.type == "cuda" and ranks.size() == 1 and not fp16
    return StepGraphs(parameters, _on_cuda() if able and stands_for - 2 >= LEAST_REPLAYS else None)


def _on_cuda() -> Record:
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool):
            work()
        replay: Work = graph.replay
        return replay

    return record
