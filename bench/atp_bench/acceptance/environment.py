"""The machine: its GPU as torch and the driver have it, versions, and which packages are there."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from atp_bench.acceptance.sizes import Sizes
from atp_edge.run.environment import environment

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "onnx", "onnx_ir",
            "onnxruntime", "bitsandbytes", "liger_kernel", "pynvml")  # fmt: skip
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What the other sections' figures are of."""
    found: dict[str, Any] = environment() | {
        "packages": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
        "cuda": torch.version.cuda,
        "bf16": torch.cuda.is_bf16_supported() if sizes.device == "cuda" else None,
    }
    if sizes.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["device"] = {
            "capability": f"{about.major}.{about.minor}",
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "driver": _driver(),
        }
    return found


def _driver() -> dict[str, str] | str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi is here"
    asked = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    if done.returncode or not done.stdout.strip():
        return (done.stderr or done.stdout).strip()[:300] or "nvidia-smi said nothing"
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(_QUERY.split(","), values, strict=False))
