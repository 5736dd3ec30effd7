"""Results that tests share: ATP on two seeds, a two-stage way on one."""

from __future__ import annotations

from atp_bench.quality.cells import Cell
from atp_bench.quality.results import Result


def results() -> list[Result]:
    def made(method: str, seed: int, perplexity: float) -> Result:
        return Result(
            cell=Cell(method=method, domain="legal", seed=seed, share=0.6, widths="per-layer",
                      steps=200),
            dense_perplexity=12.0,
            perplexity_at_freeze=40.0,
            perplexity=perplexity,
            recovery=12.0 / perplexity,
            tasks={"average": 0.9},
            decoder_share=0.6,
            whole_share=0.68,
            tokens=102_400,
            seconds=1.0,
        )  # fmt: skip

    return [made("atp", 0, 20.0), made("atp", 1, 24.0), made("two-stage: group-taylor", 0, 30.0)]
