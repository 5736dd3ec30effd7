"""Triton without a GPU: the interpreter for meaning, ahead-of-time compilation for the targets.

Each in a process of its own: what Triton reads from its environment is read at import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`, Linux only)")

# Compute capability -> most registers a thread; nothing may spill to memory.
REGISTER_BUDGET = {80: 255, 86: 255, 89: 255, 90: 255, 100: 255, 120: 255}

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from atp_kernels.masked_lora import forward_kernel
names = forward_kernel.arg_names
pointers = [n for n in names if n.endswith("_ptr")]
constants = dict(R=16, HAS_BIAS=True, HAS_OUT_MASK=True, HAS_IN_MASK=True, WHOLE=False,
                 BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
signature = {n: "*fp16" if n in pointers else "constexpr" if n in constants else "i32"
             for n in names}
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
kernel = triton.compile(ASTSource(forward_kernel, signature, constants, attributes),
                        target=GPUTarget("cuda", CAPABILITY, 32),
                        options={"num_warps": 4, "num_stages": 3})
print(json.dumps({"ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared,
                  "cubin": len(kernel.asm["cubin"])}))
open(sys.argv[1], "wb").write(kernel.asm["cubin"])
"""


def run(code_or_path: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code_or_path],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreter_cases.py")
    done = run(["-m", "pytest", "-q", str(cases)], TRITON_INTERPRET="1", ATP_KERNELS="triton")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("capability", REGISTER_BUDGET)
def test_compiles_ahead_of_time_without_spilling(tmp_path: Path, capability: int) -> None:
    cubin = tmp_path / "kernel.cubin"
    code = COMPILE.replace("CAPABILITY", str(capability))
    done = run(["-c", code, str(cubin)], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["cubin"] > 0
    ptx = made["ptx"]
    assert "mma" in ptx, "no tensor core instruction"
    assert "cp.async" in ptx or "cp.async.bulk" in ptx, "loads are not pipelined"
    # The smallest shared memory of the targets (sm_86, 89, 120): 99 KiB.
    assert made["shared"] <= 99 * 1024
    registers, spilled = resources(cubin)
    assert registers <= REGISTER_BUDGET[capability]
    assert spilled == 0


def resources(cubin: Path) -> tuple[int, int]:
    """(registers a thread, bytes of local memory) of a compiled kernel, by cuobjdump."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    )
    usage = dict(
        part.split(":")[:2] for line in (done.stdout + done.stderr).splitlines()
        if "REG:" in line for part in line.split() if ":" in part
    )  # fmt: skip
    return int(usage["REG"]), int(usage["LOCAL"])
