"""Every runtime asked for its ids of texts and for the greedy tokens after them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from atp_export.layouts import openvino_genai as genai_folder
from atp_export.layouts.openvino_genai import EXACT
from atp_export.layouts.transformers_js import to_transformers_js
from tokenizers import Tokenizer

from tests.atp_export.runtimes.cells import FLAVOURS, NEW_TOKENS, ROOT

EXAMPLES = ROOT / "examples" / "onnx"
HERE = Path(__file__).parent
NODE = Path(os.environ.get("ATP_NODE_FOLDER", "build/node")).absolute()
NODE_LARGE = Path(os.environ.get("ATP_NODE_FOLDER_LARGE", "build/large/node")).absolute()
OPTIMUM = Path(
    os.environ.get("ATP_OPTIMUM_PYTHON", "build/large/optimum/bin/python")
).absolute()  # Not resolved: an environment's python is a link.


@dataclass(frozen=True, kw_only=True)
class Answers:
    """ids: of every text; tokens: greedy ones after each."""

    ids: list[list[int]]
    tokens: list[list[int]]


def _json_of(command: Sequence[str], cwd: Path) -> Any:
    """What a program prints last, as JSON. Raises ValueError with its words when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def ids_of_the_folder(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """By tokenizer.json alone, for runtimes without a tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


def onnxruntime(folder: Path, texts: Sequence[str]) -> Answers:
    """examples/onnx/generate.py: numpy and onnxruntime alone."""
    generate = runpy.run_path(str(EXAMPLES / "generate.py"))["generate"]
    ids = ids_of_the_folder(folder, texts)
    return Answers(ids=ids, tokens=[generate(folder, row, NEW_TOKENS) for row in ids])


def onnxruntime_node(folder: Path, texts: Sequence[str]) -> Answers:
    """examples/onnx/generate.mjs."""
    command = ["node", str(EXAMPLES / "generate.mjs"), str(folder), str(NEW_TOKENS)]
    ids = ids_of_the_folder(folder, texts)
    tokens = [_json_of([*command, *map(str, row)], NODE)["tokens"] for row in ids]
    return Answers(ids=ids, tokens=tokens)


def onnxruntime_genai(folder: Path, texts: Sequence[str]) -> Answers:
    """By the folder's own genai_config.json. BOS comes where it is asked for (docs/data.md)."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    ids = [[int(i) for i in tokenizer.encode(text)] for text in texts]
    tokens = []
    for row in ids:
        options, end = og.GeneratorParams(model), len(row) + NEW_TOKENS
        options.set_search_options(max_length=end, min_length=end, do_sample=False)
        generator = og.Generator(model, options)
        generator.append_tokens(np.array(row, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        tokens.append([int(t) for t in generator.get_sequence(0)[len(row) :]])
    return Answers(ids=ids, tokens=tokens)


def openvino(folder: Path, texts: Sequence[str]) -> Answers:
    """model.onnx on the CPU in f32, its cache fed back."""
    import openvino as ov

    model = ov.Core().compile_model(str(folder / "model.onnx"), "CPU", EXACT)
    ids = ids_of_the_folder(folder, texts)
    return Answers(ids=ids, tokens=[_openvino_greedy(model, row) for row in ids])


def _openvino_greedy(model: Any, row: list[int]) -> list[int]:
    inputs = {i.get_any_name(): i for i in model.inputs}
    cache = {}
    for name, past in inputs.items():
        if name.startswith("past_key_values."):
            _, heads, _, width = past.get_partial_shape()
            kind = past.get_element_type().to_dtype()
            cache[name] = np.zeros((1, heads.get_length(), 0, width.get_length()), kind)
    step, length, tokens = row, 0, []
    while len(tokens) < NEW_TOKENS:
        length += len(step)
        feed = cache | {
            "input_ids": np.array([step]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(step), length)[None],
        }
        out = model({name: value for name, value in feed.items() if name in inputs})
        cache = {n: out[model.output(n.replace("past_key_values", "present"))] for n in cache}
        step = [int(out[model.output("logits")][0, -1].argmax())]
        tokens += step
    return tokens


def openvino_genai(folder: Path, texts: Sequence[str]) -> Answers:
    """`--layout openvino`: an IR with its cache inside and its own tokenizer."""
    copy = shutil.copytree(folder, folder.with_name("openvino"))
    genai_folder.to_openvino(copy)
    genai_folder.without_onnx(copy)
    said = genai_folder.ask(copy, texts=texts, prompts=texts, new_tokens=NEW_TOKENS)
    return Answers(ids=said.ids, tokens=said.tokens)


def transformers_js(folder: Path, texts: Sequence[str]) -> Answers:
    """`--layout transformers.js`, in Node."""
    precision = json.loads((folder / "manifest.json").read_text())["provenance"]["precision"]
    copy = shutil.copytree(folder, folder.with_name("transformers_js"))
    to_transformers_js(copy, precision)
    script = HERE.parent / "layouts" / "transformers_js.mjs"
    command = ["node", str(script), str(copy), str(NEW_TOKENS), *texts]
    said = _json_of(command, NODE_LARGE)
    return Answers(ids=[x["ids"] for x in said], tokens=[x["tokens"] for x in said])


def optimum(folder: Path, texts: Sequence[str]) -> Answers:
    """optimum-onnx with the transformers that it wants, in an environment of its own."""
    return _optimum_answers(folder, texts)


def optimum_any_widths(folder: Path, texts: Sequence[str]) -> Answers:
    """The same by examples/onnx/optimum_any_widths.py."""
    return _optimum_answers(folder, texts, by=str(EXAMPLES / "optimum_any_widths.py"))


def _optimum_answers(folder: Path, texts: Sequence[str], **by: str) -> Answers:
    process = _optimum()
    asked = {"folder": str(folder), "texts": list(texts), "new": NEW_TOKENS} | by
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    said = json.loads(process.stdout.readline())
    if "error" in said:
        raise ValueError(said["error"])
    return Answers(**said)


@cache
def _optimum() -> Any:
    """One process for all folders: it is seconds until it has imported all it wants."""
    command = [str(OPTIMUM), "-W", "ignore", str(HERE / "optimum_onnx.py")]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def node_package(folder: Path, name: str) -> str | None:
    """The version of an npm package that lies in a folder."""
    path = folder / "node_modules" / name / "package.json"
    found = shutil.which("node") and path.is_file()
    return json.loads(path.read_text())["version"] if found else None


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _optimum_version() -> str | None:
    if not OPTIMUM.is_file():
        return None
    asked = "import importlib.metadata as m; print(m.version('optimum-onnx'))"
    done = subprocess.run([str(OPTIMUM), "-c", asked], capture_output=True, text=True, check=True)
    return done.stdout.strip()


Ask = Callable[[Path, Sequence[str]], Answers]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """version: None where it is not at hand. tokenizer: what makes its ids."""

    name: str
    ask: Ask
    version: Callable[[], str | None]
    tokenizer: str
    flavours: tuple[str, ...] = FLAVOURS


OURS = "none: `tokenizer.json` by us"
OWN = "its own"
RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(name="ONNX Runtime, Python", ask=onnxruntime, tokenizer=OURS,
                version=lambda: _package("onnxruntime-gpu") or _package("onnxruntime")),
        Runtime(name="onnxruntime-node", ask=onnxruntime_node, tokenizer=OURS,
                version=lambda: node_package(NODE, "onnxruntime-node")),
        Runtime(name="onnxruntime-genai", ask=onnxruntime_genai,
                tokenizer='its own, asked for `add_special_tokens="true"`',
                version=lambda: _package("onnxruntime-genai")),
        Runtime(name="OpenVINO", ask=openvino, tokenizer=OURS,
                version=lambda: _package("openvino")),
        Runtime(name="openvino_genai", ask=openvino_genai, flavours=("portable",),
                tokenizer="converted by openvino_tokenizers",
                version=lambda: _package("openvino-genai")),
        Runtime(name="transformers.js", ask=transformers_js, tokenizer=OWN,
                version=lambda: node_package(NODE_LARGE, "@huggingface/transformers")),
        Runtime(name="optimum-onnx", ask=optimum, tokenizer="that of its transformers",
                version=_optimum_version),
        Runtime(name="optimum-onnx, any widths", ask=optimum_any_widths,
                tokenizer="that of its transformers", version=_optimum_version),
    )
}  # fmt: skip
