"""What ships, on ONNX Runtime's CUDA provider: dense and slim, fp16 and int4, our runtime with its
inputs, cache and logits bound (IO binding).

A model of SmolLM2-135M's sizes and random weights. Tokens are held to those of the same file on the
CPU provider: the share of positions at which both would choose the same token, over one text.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from atp_bench.acceptance.models import random_llama
from atp_bench.acceptance.sizes import SMOLLM2, Sizes
from atp_bench.acceptance.timing import clocked_ms
from atp_bench.peers.untrained_cut import cut_plan
from atp_edge.config import Precision
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model

PRECISIONS: tuple[Precision, ...] = ("fp16", "int4")
_TOY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
_PROMPT, _NEW = 512, 64


def measure(sizes: Sizes, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """By model and precision: load, first token, a further token, memory, and equal tokens."""
    from atp_export.export import export_onnx

    found: dict[str, Any] = {"rows": {}, "prompt_tokens": _prompt(sizes), "new_tokens": _NEW}
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkpoint in _checkpoints(sizes, Path(scratch)):
            for precision in PRECISIONS:
                folder = Path(scratch) / f"{name}-{precision}"
                export_onnx(checkpoint, folder, precision=precision)
                row = _row(folder, sizes)
                found["rows"][f"{name}, {precision}"] = row
                keep(found)
    for precision in PRECISIONS:
        dense, slim = (found["rows"][f"{name}, {precision}"] for name in ("dense", "slim"))
        found[f"{precision}, dense over slim"] = {
            key: dense[key] / slim[key] for key in ("first_token_ms", "token_ms", "file_bytes")
        }
    return found


def _checkpoints(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, Path]]:
    config = LlamaConfig(
        **SMOLLM2 | (_TOY if sizes.toy else {}), bos_token_id=1, eos_token_id=2, dtype="float32"
    )
    dense = random_llama(config, "cpu", torch.float32)
    plan = cut_plan(model_shape(config), sizes.kept, "per-layer")
    for name, model in {"dense": dense, "slim": narrow_model(dense, plan)}.items():
        save_narrow(model, None, scratch / name)
        yield name, scratch / name


def _prompt(sizes: Sizes) -> int:
    return 16 if sizes.toy else _PROMPT


def _row(folder: Path, sizes: Sizes) -> dict[str, Any]:
    from atp_export.runtime import Session

    row: dict[str, Any] = {"file_bytes": sum(f.stat().st_size for f in folder.glob("model.onnx*"))}
    if sizes.device == "cpu":
        return row | _times(Session(folder, provider="CPUExecutionProvider"), sizes)
    before = _device_bytes()
    made: list[Any] = []
    row["load_ms"] = clocked_ms(lambda: made.append(Session(folder, provider=_CUDA)))
    loaded = _device_bytes()
    row |= _times(made[0], sizes)
    row |= {"device_bytes_loaded": loaded - before, "device_bytes_run": _device_bytes() - before}
    row["device_bytes_above_file"] = row["device_bytes_run"] - row["file_bytes"]
    row["same_choices"] = _same_choices(folder, made.pop(), sizes)
    try:
        row["cuda_graph"] = _times(Session(folder, provider=_CUDA, cuda_graph=True), sizes)
    except Exception as error:  # What the runtime cannot capture, it says in types of its own.
        row["cuda_graph"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return row


_CUDA = "CUDAExecutionProvider"


def _device_bytes() -> int:
    """Of the whole device, as the driver has it: the arenas of both runtimes, and all else."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _times(session: Any, sizes: Sizes) -> dict[str, Any]:
    from atp_export.runtime import Generation

    draw = np.random.default_rng(0)
    firsts, tokens, chosen = [], [], []
    for _ in range(1 + sizes.rounds):  # The first one warms up.
        prompt = draw.integers(5, session.vocabulary, (1, _prompt(sizes)))
        state = Generation(session, 1, _prompt(sizes) + _NEW + 1)
        logits: list[Any] = []
        firsts.append(clocked_ms(partial(_fed, state, prompt, logits)))
        for _ in range(_NEW):
            fed = logits.pop().argmax(-1)
            chosen.append(int(fed[0, 0]))
            tokens.append(clocked_ms(partial(_fed, state, fed, logits)))
    return {
        "provider": session.provider,
        "first_token_ms": statistics.median(firsts[1:]),
        "token_ms": statistics.median(tokens[_NEW:]),
        "different_tokens_chosen": len(set(chosen)),
    }


def _fed(state: Any, tokens: Any, logits: list[Any]) -> None:
    logits.append(state.step(tokens, last_only=tokens.shape[1] > 1))


def _same_choices(folder: Path, on_gpu: Any, sizes: Sizes) -> float:
    """The share of positions of one text at which both providers choose the same token."""
    from atp_export.runtime import Generation, Session

    text = np.random.default_rng(1).integers(5, on_gpu.vocabulary, (1, _prompt(sizes)))
    choices = [
        Generation(session, 1, text.shape[1] + 1).step(text).argmax(-1)
        for session in (on_gpu, Session(folder, provider="CPUExecutionProvider"))
    ]
    return float((choices[0] == choices[1]).mean())
