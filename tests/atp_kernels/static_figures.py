"""Static figures of every kernel, compiled ahead of time for one target; no GPU needed.

python static_figures.py 90        figures of sm_90, as JSON on the last line
python static_figures.py --write   all targets, into budgets.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from atp_kernels import (
    masked_gemm_triton,
    norm_triton,
    proximal_triton,
    rope_triton,
    scored_mask_triton,
    swiglu_triton,
)
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "")
TARGETS = (80, 86, 89, 90, 100, 120)
GEMM = {
    "R": 16,
    "BLOCK_R": 16,
    "HAS_BIAS": False,
    "HAS_OUT_MASK": False,
    "OUT_LIST": False,
    "IN_LIST": False,
    "GATHER_W": False,
    "WHOLE": False,
    "REDUCE": False,
    **masked_gemm_triton.BLOCKS,
}
# Ranks up to 16 are padded to 16, so that rank 8 is the default above.
LONG_RANK = {"R": 64, "BLOCK_R": masked_gemm_triton.LARGEST_BLOCK_R}
FORWARD, BACKWARD = {"stride_wk": 1, "stride_br": 1}, {"stride_wn": 1, "stride_bn": 1}
SWIGLU = {"BLOCK_M": swiglu_triton.BLOCK_M, "BLOCK_N": swiglu_triton.BLOCK_N}
NORM = {"HAS_A": True, "BLOCK_M": norm_triton.BLOCK_M, "BLOCK_K": norm_triton.BLOCK_K}
ROPE = {"D": 128, "HALF": 64, "BLOCK_M": rope_triton.BLOCK_M}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gemm, gate forward, fixed": (
        masked_gemm_triton.masked_gemm_kernel, "fp16", GEMM | FORWARD | {"OUT_LIST": True},
    ),
    "gemm, down forward, fixed": (
        masked_gemm_triton.masked_gemm_kernel, "bf16", GEMM | FORWARD | {"IN_LIST": True},
    ),
    "gemm, gate backward, fixed": (
        masked_gemm_triton.masked_gemm_kernel, "bf16",
        GEMM | BACKWARD | {"IN_LIST": True, "GATHER_W": True},
    ),
    "gemm, down backward, fixed": (
        masked_gemm_triton.masked_gemm_kernel, "bf16", GEMM | BACKWARD | {"OUT_LIST": True},
    ),
    "gemm, down backward, mask gradient": (
        masked_gemm_triton.masked_gemm_kernel, "bf16",
        GEMM | BACKWARD | {"HAS_OUT_MASK": True, "REDUCE": True, "WHOLE": True},
    ),
    "gemm, q k v forward, bias, float mask, three ranks of 64": (
        masked_gemm_triton.masked_gemm_kernel, "bf16",
        GEMM | FORWARD | {"HAS_BIAS": True, "HAS_OUT_MASK": True} | LONG_RANK | {"R": 192},
    ),
    "gemm, q k v backward, fixed, three ranks of 64": (
        masked_gemm_triton.masked_gemm_kernel, "bf16",
        GEMM | BACKWARD | {"IN_LIST": True, "GATHER_W": True} | LONG_RANK | {"R": 192},
    ),
    "gemm, o forward, rank 64": (
        masked_gemm_triton.masked_gemm_kernel, "bf16",
        GEMM | FORWARD | {"WHOLE": True} | LONG_RANK,
    ),
    "gemm, down backward, mask gradient, fp32": (
        masked_gemm_triton.masked_gemm_kernel, "fp32",
        GEMM | BACKWARD | {"HAS_OUT_MASK": True, "REDUCE": True, "WHOLE": True} | LONG_RANK
        | masked_gemm_triton.BLOCKS_FP32,
    ),
    "swiglu forward, h A beside it, rank 64": (
        swiglu_triton.swiglu_forward_kernel, "bf16",
        swiglu_triton.WITH_A | {"HAS_MASK": False, "HAS_A": True, "BLOCK_R": 64},
    ),
    "swiglu backward, mask gradient and importance": (
        swiglu_triton.swiglu_backward_kernel, "bf16", SWIGLU | {"HAS_MASK": True},
    ),
    "norm forward, residual, x A beside it, three ranks of 64": (
        norm_triton.norm_forward_kernel, "bf16", NORM | {"HAS_DELTA": True, "BLOCK_R": 256},
    ),
    "norm backward": (
        norm_triton.norm_backward_kernel, "bf16", norm_triton.BACKWARD | {"HAS_BESIDE": True},
    ),
    "rope": (rope_triton.rope_kernel, "bf16", ROPE | {"BACKWARD": False}),
    "rope backward": (rope_triton.rope_kernel, "bf16", ROPE | {"BACKWARD": True}),
    "scored mask": (
        scored_mask_triton.scored_mask_kernel, "bf16",
        {"BLOCK_M": scored_mask_triton.BLOCK_M, "BLOCK_W": scored_mask_triton.LARGEST_BLOCK_W},
    ),
    "proximal step, rank 64": (
        proximal_triton.proximal_kernel, "fp32",
        {"BLOCK_S": proximal_triton.BLOCK_S, "BLOCK_W": proximal_triton.BLOCK_W, "BLOCK_R": 64},
    ),
}  # fmt: skip
_KINDS = {"out_order_ptr": "*i32", "out_count_ptr": "*i32", "in_order_ptr": "*i32",
          "in_count_ptr": "*i32", "table_ptr": "*i64"}  # fmt: skip
_KINDS |= {f"{name}_ptr": "*fp32" for name in (
    "partial", "square", "stream", "new", "weight", "root", "d_stream", "beside", "cosine", "sine",
)}  # fmt: skip
_NUMBERS = {"eps": "fp32", "threshold": "fp32"}


def compiled(name: str, capability: int) -> Any:
    """One case for one target. Every argument is a multiple of 16 as torch's allocations are."""
    kernel, kind, constants = CASES[name]
    signature = {
        n: "constexpr" if n in constants
        else (_KINDS.get(n, f"*{kind}") if n.endswith("_ptr") else _NUMBERS.get(n, "i32"))
        for n in kernel.arg_names
    }  # fmt: skip
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and n not in _NUMBERS
    }
    options = {"num_warps": 4}
    if kernel is masked_gemm_triton.masked_gemm_kernel:
        options = {
            "num_warps": masked_gemm_triton.NUM_WARPS,
            "num_stages": masked_gemm_triton.NUM_STAGES,
        }
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


def figures(name: str, capability: int) -> dict[str, Any]:
    """Registers, spills, shared memory, and whether the loop is pipelined on tensor cores."""
    made = compiled(name, capability)
    ptx = made.asm["ptx"]
    usage = resource_usage(made.asm["cubin"])
    return {
        "registers": usage["REG"],
        # What does not fit into registers lies in the stack frame; LOCAL is 0 either way.
        "spilled_bytes": usage["STACK"],
        "shared_bytes": made.metadata.shared,
        "tensor_core": next(name for name in TENSOR_CORES if name in ptx or not name),
        "loads_in_flight": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "serialized": capability == 90 and "serialized" in assembler_says(ptx),
    }


def assembler_says(ptx: str) -> str:
    """ptxas warns when it cannot keep several wgmma in flight and waits for each (sm_90)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", str(path), "-o", f"{folder}/cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "registers" in done.stderr, "ptxas says nothing of the kernel"
    return done.stderr


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a compiled kernel: REG, STACK, SHARED, LOCAL."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    pairs = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout + done.stderr)
    return {key: int(value) for key, value in pairs}


def main(argument: str) -> None:
    if argument == "--write":
        found = {str(c): {name: figures(name, c) for name in CASES} for c in TARGETS}
        path = Path(__file__).with_name("budgets.json")
        path.write_text(json.dumps(found, indent=2) + "\n")
        return
    print(json.dumps({name: figures(name, int(argument)) for name in CASES}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
