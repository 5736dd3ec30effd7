"""What loads where: runtime x flavour x widths x precision, each cell by loading and generating.

`python -m tests.atp_export.runtimes NODE_FOLDER [OPTIMUM_PYTHON]` runs the whole matrix and writes
docs/runtimes.json and docs/runtimes.md. NODE_FOLDER holds node_modules with onnxruntime-node;
OPTIMUM_PYTHON is the interpreter of an environment with optimum-onnx. Tiny random Llamas: loading
and computing right are questions of operators and shapes, not of size.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from atp_export.export import export_onnx
from atp_export.runtime import Generation, Session, generate_tokens
from atp_export.verification.verify import RELATIVE_TOLERANCE

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model
from tests.tiny import PLANS, to_cut

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "onnx"
RESULTS, PAGE = ROOT / "docs" / "runtimes.json", ROOT / "docs" / "runtimes.md"
FLAVOURS = ("ort", "standard", "portable")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
PROMPT, NEW_TOKENS = [1, 2, 3, 4], 8
Check = Callable[[Path, str], None]


def export_cell(root: Path, flavour: str, widths: str, precision: str) -> Path:
    """A tiny exported model of one cell."""
    save_narrow(narrow_model(*to_cut("llama", widths)), None, root / "slim")
    options: dict[str, Any] = {"flavour": flavour, "precision": precision}
    export_onnx(root / "slim", root / "onnx", **options)
    return root / "onnx"


def _same_tokens(folder: Path, tokens: list[int]) -> None:
    (own,) = generate_tokens(Session(folder), [PROMPT], max_new_tokens=NEW_TOKENS)
    assert tokens == own, f"generated {tokens}, expected {own}"


def _example(command: list[str], folder: Path, cwd: Path) -> None:
    arguments = [str(folder), str(NEW_TOKENS), *map(str, PROMPT)]
    done = subprocess.run(
        [*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-300:]
    _same_tokens(folder, json.loads(done.stdout)["tokens"])


def plain_python(folder: Path, precision: str) -> None:
    """examples/onnx/generate.py: numpy and onnxruntime alone."""
    _example([sys.executable, str(EXAMPLES / "generate.py")], folder, ROOT)


def node_in(node_folder: Path) -> Check:
    """examples/onnx/generate.mjs, with the node_modules of a folder."""
    command = ["node", str(EXAMPLES / "generate.mjs")]
    return lambda folder, precision: _example(command, folder, node_folder)


def genai(folder: Path, precision: str) -> None:
    """onnxruntime-genai by the folder's own genai_config.json."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    options, end = og.GeneratorParams(model), len(PROMPT) + NEW_TOKENS
    options.set_search_options(max_length=end, min_length=end, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    _same_tokens(folder, [int(t) for t in generator.get_sequence(0)[len(PROMPT) :]])


def openvino(folder: Path, precision: str) -> None:
    """OpenVINO on the CPU in f32: prompt, then one token with the cache it gave."""
    import openvino as ov

    model = ov.Core().compile_model(
        str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    state = Generation(Session(folder), 1, 8)
    inputs = {i.get_any_name(): i.get_partial_shape() for i in model.inputs}
    kind = state.session.cache_type
    cache = {
        name: np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), kind)
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    length = 0
    for step in (PROMPT, [5]):
        length += len(step)
        feed = cache | {
            "input_ids": np.array([step]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(step), length)[None],
        }
        out = model({name: value for name, value in feed.items() if name in inputs})
        cache = {n: out[model.output(n.replace("past_key_values", "present"))] for n in cache}
        expected = state.step(np.array([step]))
        error = np.sqrt(np.mean((out[model.output("logits")] - expected) ** 2)) / expected.std()
        assert error <= RELATIVE_TOLERANCE[precision], f"logits differ by {error:.1e}"


_OPTIMUM = """
import sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, new, *prompt = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
# It takes hidden_size / num_attention_heads for Llamas, whatever head_dim says.
model.embed_size_per_head = model.config.head_dim
ids = torch.tensor([[int(x) for x in prompt]])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(new),
                     min_new_tokens=int(new), do_sample=False, pad_token_id=0, eos_token_id=None)
print({"tokens": out[0, ids.shape[1]:].tolist()}.__repr__().replace("'", '"'))
"""


def optimum_by(python: Path) -> Check:
    """optimum's ORTModelForCausalLM, in an environment of its own (it wants an older
    transformers than ours)."""
    command = [str(python), "-W", "ignore", "-c", _OPTIMUM]
    return lambda folder, precision: _example(command, folder, folder)


def attempt(check: Check, flavour: str, widths: str, precision: str) -> str:
    """`yes`, or why not, in one line."""
    with tempfile.TemporaryDirectory() as root:
        folder = export_cell(Path(root), flavour, widths, precision)
        try:
            check(folder, precision)
        except Exception as error:
            lines = [x.strip() for x in str(error).replace(str(root), "").splitlines() if x.strip()]
            told = [x for x in lines if "Got" in x or "rror" in x] or lines
            return f"no: {told[-1] if told else type(error).__name__}"[:200]
    return "yes"


def render(results: dict[str, Any]) -> str:
    """The page, from the results alone."""
    lines = [
        "# What loads where",
        "",
        "Written by `python -m tests.atp_export.runtimes`: it exports the model of each cell,",
        "loads it in the runtime, and compares the tokens it generates with those of",
        "`atp-edge generate` (OpenVINO: the logits of a prompt and of the next token, with the",
        f"cache it gave). CPU, {results['date']}. Tests hold this page to `runtimes.json` and",
        "repeat cells of it.",
        "",
        "| runtime | flavour | widths | " + " | ".join(PRECISIONS) + " |",
        "|---|---|---|" + "---|" * len(PRECISIONS),
    ]
    notes: list[str] = []
    for runtime, cells in results["runtimes"].items():
        for flavour in FLAVOURS:
            for widths in PLANS:
                row = []
                for precision in PRECISIONS:
                    outcome = cells["cells"][f"{flavour}/{widths}/{precision}"]
                    if outcome != "yes" and outcome not in notes:
                        notes.append(outcome)
                    row.append("yes" if outcome == "yes" else f"no [{notes.index(outcome) + 1}]")
                name = f"{runtime} {cells['version']}"
                lines.append(f"| {name} | {flavour} | {widths} | {' | '.join(row)} |")
    lines += ["", *(f"{i}. {note.removeprefix('no: ')}" for i, note in enumerate(notes, 1)), ""]
    lines += [
        "bf16 is for GPUs: the CPU providers have no bf16 MatMul. ONNX Runtime's CUDA provider",
        "loads it; `atp_export.runtime` does not feed its bf16 cache yet and says so. `ort` is",
        "opset 23 with com.microsoft operators, `standard` opset 23 alone, `portable` opset 18 (21",
        "when quantized).",
        "",
        "On a GPU `ort` in fp16 was tried by hand (ONNX Runtime 1.31.1's CUDA provider, an H200,",
        "dense and slim SmolLM2-135M): both equal their PyTorch models as `atp-edge verify` asks.",
        "`Session(folder, cuda_graph=True)` replays one further token as a CUDA graph: the same",
        "tokens, in 1.3 ms instead of 3.1 ([log](research/log.md)). Tests hold on the CPU what a",
        "graph needs: from token to token no buffer moves and no shape changes.",
        "",
        "GGUF in llama.cpp and transformers.js's layout have tests of their own, with real text",
        "through their own tokenizers: [gguf.md](gguf.md), `tests/atp_export/layouts/`.",
        "",
        "int8 and int4 here are rounded to the nearest. `gptq`, a run's default for int4, writes",
        "the same nodes with other numbers; `k-quant` gives MatMulNBits, GatherBlockQuantized and",
        "DequantizeLinear a zero point a block more (tests: every flavour on ONNX Runtime; not",
        "measured yet elsewhere).",
        "",
        "No file makes ONNX Runtime warn, except one with adapters (once a LoRA factor, which is",
        "an optional input). Where logits start is a constant of the file (all positions), which",
        "`atp_export.runtime` alone makes an input, for prefills that need only the last position.",
        "",
        "optimum-onnx wants an older transformers than ours, hence an environment of its own; its",
        "ORTModelForCausalLM sizes every layer's cache alike (per-layer widths cannot load) and",
        "takes `hidden_size / num_attention_heads` for the head size of a Llama: set",
        "`model.embed_size_per_head = model.config.head_dim` after loading, as the command does.",
    ]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main() -> None:
    import datetime

    node_folder, *optimum = map(Path, sys.argv[1:])
    packages = node_folder / "node_modules" / "onnxruntime-node" / "package.json"
    version = importlib.metadata.version
    runtimes: dict[str, tuple[str, Check]] = {
        "ONNX Runtime, Python": (version("onnxruntime-gpu"), plain_python),
        "onnxruntime-node": (json.loads(packages.read_text())["version"], node_in(node_folder)),
        "onnxruntime-genai": (version("onnxruntime-genai"), genai),
        "OpenVINO": (version("openvino"), openvino),
    }
    if optimum:
        asked = "import importlib.metadata as m; print(m.version('optimum-onnx'))"
        done = subprocess.run(
            [str(optimum[0]), "-c", asked], capture_output=True, text=True, check=True
        )
        runtimes["optimum-onnx"] = (done.stdout.strip(), optimum_by(optimum[0]))
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "runtimes": {
            name: {
                "version": number,
                "cells": {
                    f"{flavour}/{widths}/{precision}": attempt(check, flavour, widths, precision)
                    for flavour in FLAVOURS
                    for widths in PLANS
                    for precision in PRECISIONS
                },
            }
            for name, (number, check) in runtimes.items()
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(results))


if __name__ == "__main__":
    main()
