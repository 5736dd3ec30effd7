"""One command for a machine with a GPU: right, fast, and as large as was said?

    PYTHONPATH=.:kernels:export:bench python bench/gpu_acceptance.py --seconds 540 --json FILE

Nothing of ours needs to be installed. `--toy` runs every section at toy size on the CPU. A section
whose packages are missing says which; `--only` takes sections by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from atp_bench.acceptance.runner import Measure, Section, python, run_one, run_sections


def _of(module: str) -> Callable[[], Measure]:
    return lambda: import_module(f"atp_bench.acceptance.{module}").measure


def _whole() -> Measure:
    """With what `--dry-run` says of the same settings and shapes."""
    return partial(_of("whole")(), expected=_said_by_dry_run)


def _said_by_dry_run(config: Any, dense: Any, slim: Any) -> dict[str, float]:
    import torch

    from atp_edge.pipeline.memory import CUDA_RUNTIME, needs_of
    from atp_edge.pipeline.memory_need import Model

    model = Model(dense=dense, slim=slim, stored=torch.bfloat16, dense_onnx=0, slim_onnx=0)
    # Of the allocator: the context is not its.
    return {n.part: n.device_bytes - CUDA_RUNTIME for n in needs_of(config, model, "cuda")}


SECTIONS = {
    "environment": Section(load=_of("environment"), seconds=15),
    "ceilings": Section(load=_of("ceilings"), seconds=20),
    "correctness": Section(load=_of("correctness"), seconds=60, interpreted=True),
    "projections": Section(load=_of("projections"), seconds=120),
    "tiles": Section(load=_of("tiles"), seconds=60, interpreted=True),
    "layers": Section(load=_of("layers"), seconds=100),
    "whole": Section(load=_whole, seconds=80),
    "loss": Section(load=_of("loss"), seconds=20),
    "closed_form": Section(load=_of("closed_form"), seconds=20),
    "small": Section(load=_of("small"), seconds=45),
    "onnx_runtime": Section(load=_of("onnx_runtime"), seconds=60),
}
"""In their order: what decides first, and what may be left out last."""


def main() -> int:
    """0 where every section that could run did."""
    asked = _arguments()
    if asked.section:
        name, part, until = asked.section
        from atp_bench.acceptance.sizes import sizes_for

        run_one(SECTIONS[name].load, sizes_for(toy=asked.toy), Path(part), float(until))
        return 0
    names = {n: SECTIONS[n] for n in SECTIONS if not asked.only or n in asked.only}
    command = [*python(Path(__file__)), *(["--toy"] if asked.toy else []), "--section"]
    found = run_sections(
        names, command, seconds=asked.seconds, out=asked.json, toy=asked.toy,
        say=lambda text: print(text, flush=True),  # noqa: T201
    )  # fmt: skip
    bad = [n for n, s in found["sections"].items() if s["status"] not in ("done", "missing")]
    return 1 if bad else 0


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540, help="for all sections together")
    parser.add_argument("--json", type=Path, default=Path("gpu-acceptance.json"), help="results")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--only", action="append", choices=[*SECTIONS], help="a section")
    parser.add_argument("--section", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
