"""llama.cpp itself, by the prebuilt node-llama-cpp, where it is at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PLACES = ("ATP_NODE_FOLDER", "build/node", ".")
"""Where node_modules is looked for: a variable's folder, the repository's, the working one."""
HOW = (
    "npm install --ignore-scripts node-llama-cpp @node-llama-cpp/linux-x64, and ATP_NODE_FOLDER "
    "names the folder of its node_modules"
)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """ids: of texts, special tokens parsed; tokens: greedy ones after prompts; nats: of each
    block's tokens but its first, summed; token_ms: the median of a greedy token. ended: whether
    each of the tokens that were named ends a text; first: whether a first token is put before
    every text."""

    release: str
    ended: list[bool]
    first: bool
    ids: list[list[int]]
    tokens: list[list[int]]
    nats: list[float]
    token_ms: float | None


def node_folder() -> Path | None:
    """The folder whose node_modules holds node-llama-cpp; None: it is not at hand."""
    if shutil.which("node") is None:
        return None
    named, *others = PLACES
    places = [os.environ.get(named, ""), *others]
    found = (Path(place).absolute() for place in places if place)
    return next((p for p in found if (p / "node_modules" / "node-llama-cpp").is_dir()), None)


def ask(
    file: Path,
    node: Path,
    *,
    texts: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 0,
    blocks: Sequence[Sequence[int]] = (),
    ends: Sequence[int] = (),
    threads: int = 1,
) -> Answers:
    """What llama.cpp makes of a file on the CPU. Raises ValueError, with its words, when it cannot
    load or run it."""
    longest = max([len(p) + new_tokens for p in prompts] + [len(b) for b in blocks], default=64)
    asked = {
        "file": str(file.absolute()), "texts": [*texts], "prompts": [list(p) for p in prompts],
        "new": new_tokens, "blocks": [list(b) for b in blocks], "threads": threads, "ends": [*ends],
        "context": -(-(longest + 8) // 256) * 256,
    }  # fmt: skip
    done = subprocess.run(
        ["node", str(SCRIPT)],
        cwd=node,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        says = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise ValueError(f"llama.cpp cannot run {file}: {' / '.join(says)}")
    return Answers(**json.loads(done.stdout.splitlines()[-1]))
