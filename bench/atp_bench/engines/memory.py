"""Peak memory of loading a model and generating with it, in a fresh process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from atp_bench.engines import open_engine

_STATUS = Path("/proc/self/status")


def peak_memory_and_load(
    folder: Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    engine: str,
    batch: int,
) -> tuple[int, float]:
    """(peak_memory_bytes, load_ms) of one process that loads `folder` and generates once,
    `batch` rows at a time.

    The peak is the process's high-water resident set, Python and ONNX Runtime included.
    """
    numbers = (prompt_tokens, new_tokens, threads or 0, batch)
    arguments = [engine, str(folder), *map(str, numbers)]
    done = subprocess.run(
        [sys.executable, "-m", "atp_bench.engines.memory", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {folder} failed:\n{done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured["peak_memory_bytes"], measured["load_ms"]


def peak_rss_bytes() -> int:
    """High-water resident set of this process, in bytes.

    Linux: VmHWM, for ru_maxrss is handed down through fork and exec: a child of a trainer of 4 GiB
    would report 4 GiB whatever it loads (proc(5), getrusage(2)).
    """
    if _STATUS.is_file():
        kib = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if kib:
            return int(kib.group(1)) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    engine, folder, *numbers = sys.argv[1:]
    prompt_tokens, new_tokens, threads, batch = map(int, numbers)
    began = time.perf_counter()
    model = open_engine(engine, Path(folder), threads or None)
    load_ms = (time.perf_counter() - began) * 1e3
    run = model.start(batch, prompt_tokens + new_tokens + 1)
    run.first(np.full((batch, prompt_tokens), 5, np.int64))
    for _ in range(new_tokens):
        run.next()
    peak = peak_rss_bytes()
    sys.stdout.write(json.dumps({"peak_memory_bytes": peak, "load_ms": load_ms}) + "\n")


if __name__ == "__main__":
    _main()
