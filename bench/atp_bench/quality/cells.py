"""The matrix: which methods, on which data, at which budget, for how long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from atp_edge.config import LORA_ALONE, RECIPES, Config
from atp_edge.decision.baselines import BASELINES
from atp_edge.settings import with_values

Preset = Literal["quick", "cpu", "gpu", "little"]
# Of the train split, at the preset `little`: a sample of each is in the next.
DOCUMENTS = (30, 100, 300, 1000)
LAYERS = "two-stage: whole layers"
# By the score that ATP starts from, which no other tool has: the hardest of the two-stage ways.
IMPORTANCE = "two-stage: importance"
# The decision is made before anything is tuned; then the cut model is tuned by LoRA alone.
TWO_STAGE = {
    "decision.learn": False,
    "decision.control_share": 0.0,
    "recovery.reconstruct_blocks": 0,
    "recovery.approach_blocks": 0,
    "recovery.retrain": False,
    "recovery.distill": 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "atp": {},
    # The same recipe, its decision frozen at the start: with the same phases, and cut at once.
    "frozen": {"decision.learn": False},
    "frozen, cut at once": {"decision.learn": False, "decision.control_share": 0.0},
    IMPORTANCE: TWO_STAGE,
    **{f"two-stage: {name}": TWO_STAGE | {"decision.start": name} for name in BASELINES},
    # ShortGPT's: layers of least influence removed; `_without_layers`.
    LAYERS: TWO_STAGE,
}
# What is chosen where a device's memory asks (docs/scale.md). Checkpointing is left out: its
# gradients are equal.
MEMORY: dict[str, dict[str, Any]] = {
    "8-bit moments": {"train.moments": "8bit"},
    "LoRA alone, rank 64, bf16 base": LORA_ALONE | {"train.base_dtype": "bf16"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "recipe: fast": RECIPES["fast"],
    "RoPE pairs, not KV groups": {"decision.space": "head-dims"},
    "plain masking": {"decision.placement": "whole"},
    "group lasso": {"decision.regularizer": "lasso"},
    "no regularizer": {"decision.regularizer": "none"},
    "penalty alone": {"decision.projection": False},
    "sampled decisions": {"decision.noise": 1.0},
    "start: all kept": {"decision.start": "all-kept"},
    "refresh every step": {"decision.interval": 1},
    "refresh every 4": {"decision.interval": 4},
    "no reconstruction": {"recovery.reconstruct_blocks": 0},
    "reconstruction at the start alone": {"recovery.reconstruct_along": False},
    "layers not approached": {"recovery.approach_blocks": 0},
    "no distillation": {"recovery.distill": 0.0},
    "logits distilled alone": {"recovery.distill_hidden": 0.0},
    "importance of the start alone": {"decision.follow": False},
    "importance alone, no gradient": {"decision.lr": 0.0},
    "kept weights at 1e-4": {"recovery.retrain_lr": 1e-4},
    "LoRA alone": {"recovery.retrain": False},
    "LoRA alone, rank where most was cut": {"recovery.retrain": False, "recovery.adapter": "ranks"},
    "DoRA alone": {"recovery.retrain": False, "recovery.adapter": "dora"},
    "LoRA alone, rank 64": LORA_ALONE,
    **MEMORY,
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the matrix; `share`: of the decoder's parameters that stay."""

    method: str
    domain: str
    seed: int
    share: float
    widths: str
    steps: int
    batch_blocks: int = 1
    documents: int = 0
    """Of the train split at most; 0: all."""

    @property
    def key(self) -> str:
        """Its name: atp/legal/0/0.6/per-layer/200; 200x64 where a step reads 64 blocks; and
        200/documents=30 where the train split is cut to them."""
        length = f"{self.steps}x{self.batch_blocks}" if self.batch_blocks > 1 else self.steps
        name = f"{self.method}/{self.domain}/{self.seed}/{self.share}/{self.widths}/{length}"
        return f"{name}/documents={self.documents}" if self.documents else name

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that its dense baseline has too: the data, and how long it is trained."""
        return {
            "data": self.domain,
            "seed": self.seed,
            "steps": self.steps,
            "train.batch_blocks": self.batch_blocks,
            "dataset.train_documents": self.documents,
        }

    def config(self, base: Config) -> Config:
        """The settings of this run. Raises ValueError for a method that is none."""
        known = METHODS | ABLATIONS
        if self.method not in known:
            raise ValueError(f"method {self.method!r}: expected one of {', '.join(known)}")
        own = {"budget": f"params={self.share}", "widths": self.widths}
        return with_values(base, self.shared | own | known[self.method])


def matrix(preset: Preset) -> list[Cell]:
    """The cells of a preset, each once, what shows most first: `quick` in minutes for CI, `cpu` in
    hours, `gpu` the full matrix, `little` by documents of the train split."""
    presets = {"quick": _quick, "cpu": _cpu, "gpu": _gpu, "little": _little}
    return list(dict.fromkeys(presets[preset]()))


# The best two-stage way, and the one that the field knows best.
_MAIN = ("atp", "frozen", IMPORTANCE, "two-stage: group-taylor")


def _quick() -> list[Cell]:
    return _cells(("atp", "two-stage: group-taylor"), domains=("legal",), steps=8)


def _cpu() -> list[Cell]:
    return [
        *_cells(_MAIN, seeds=(0, 1, 2)),
        *_cells(("frozen, cut at once",)),
        *_cells(("atp",), domains=("legal",), steps=100),
        *_cells(("atp",), domains=("legal",), steps=400),
        *_cells(("atp",), shares=(0.8, 0.5)),
        *_cells(("atp",), domains=("legal",), widths=("uniform",)),
        *_cells(METHODS, domains=("legal",)),
        *_cells(ABLATIONS, domains=("legal",)),
        *_cells(MEMORY, domains=("health",)),
        *_cells(("atp",), domains=("legal",), steps=RECIPES["best"]["steps"]),
    ]


def _gpu() -> list[Cell]:
    budgets, widths = (0.8, 0.6, 0.5), ("per-layer", "uniform")
    return [
        *_cells(METHODS, seeds=(0, 1, 2), shares=budgets, widths=widths),
        *_cells(ABLATIONS, seeds=(0, 1, 2)),
        # One block a step leaves a GPU idle.
        *_cells(_MAIN, steps=400, batch_blocks=4, seeds=(0, 1, 2)),
        *_cells(_MAIN, steps=130, batch_blocks=64),
        *_cells(_MAIN, steps=640, batch_blocks=64),
    ]


def _little() -> list[Cell]:
    """As many steps as with all documents: the fewest, 67,657 tokens, are then read 1.5 times."""
    return [
        replace(cell, documents=documents)
        for documents in DOCUMENTS
        for cell in _cells(("frozen, cut at once", "atp"), domains=("legal",))
    ]


def _cells(
    methods: Iterable[str],
    *,
    domains: Iterable[str] = ("legal", "health"),
    seeds: Iterable[int] = (0,),
    shares: Iterable[float] = (0.6,),
    widths: Iterable[str] = ("per-layer",),
    steps: int = 200,
    batch_blocks: int = 1,
) -> list[Cell]:
    return [
        Cell(method=method, domain=domain, seed=seed, share=share, widths=width, steps=steps,
             batch_blocks=batch_blocks)
        for seed, domain, share, width, method in product(seeds, domains, shares, widths, methods)
    ]  # fmt: skip
