"""Whatever stands in a file that a user can bring, reading it ends well or in one error naming it.

A stored run is damaged one file at a time: bytes are changed, put in and taken out, and values of
JSON are replaced. ATP_FUZZ_FILES=10000 tries more (`make soak`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from atp_export.manifest import verify_manifest
from atp_export.runtime import Session
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from atp_edge.data.reader import read_corpus
from atp_edge.gate.counterfactuals import read_pairs
from atp_edge.gate.prompts import read_rules
from atp_edge.gate.settings import read_gate_settings
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.loading import check_model, load_tokenizer
from atp_edge.model.plan import read_plan
from atp_edge.run.folder import RunFolder
from atp_edge.settings import read_config
from tests.atp_edge.pipeline.test_runs_of_before import STORED
from tests.tiny import QUICK_GATE
from tests.tiny_tokenizers import CHATML

LONGEST_SECONDS = 60  # of one file; they take milliseconds
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read_chat(run: Path) -> None:
    """A conversation, rendered by the template of the tokenizer."""
    read_corpus(str(run / "chat.jsonl"), load_tokenizer(run / "dense"))


def read_model(run: Path) -> None:
    check_model(run / "dense")
    load_narrow(run / "dense")


READERS: dict[str, Callable[[Path], object]] = {
    "config.toml": lambda run: read_config(run / "config.toml"),
    "gate.toml": lambda run: read_gate_settings(run / "gate.toml", {}),
    "plan.json": lambda run: read_plan(run / "plan.json"),
    "metrics.json": lambda run: RunFolder(run).metrics(),
    "rules.jsonl": lambda run: read_rules(run / "rules.jsonl"),
    "pairs.jsonl": lambda run: read_pairs(run / "pairs.jsonl", {}),
    "onnx/manifest.json": lambda run: verify_manifest(run / "onnx"),
    "onnx/model.onnx": lambda run: Session(run / "onnx"),
    "onnx/genai_config.json": lambda run: Session(run / "onnx"),
    "dense/model.safetensors": read_model,
    "dense/config.json": read_model,
    "dense/generation_config.json": read_model,
    "dense/tokenizer.json": read_chat,
    "dense/tokenizer_config.json": read_chat,
    "dense/chat_template.jinja": read_chat,
}
TRIES = int(os.environ.get("ATP_FUZZ_FILES", "500")) // len(READERS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(STORED / "finished", folder)
    shutil.copy(QUICK_GATE, folder / "gate.toml")
    (folder / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
    (folder / "dense" / "chat_template.jinja").write_text(CHATML)
    rules = [{"prompt": "a", "regex": "b.*", "expect": "never"}, {"prompt": "c", "max_length": 4}]
    (folder / "rules.jsonl").write_text("\n".join(map(json.dumps, rules)))
    pair = {"a": "he paid it", "b": "she paid it", "attribute": "gender"}
    (folder / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 3))
    return folder


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../x", "/etc/passwd", "\ud83d", "", "nan", [], {}, [[]], {"a": {}}]),
)  # fmt: skip


def bytes_damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Up to four pieces of it changed, taken out or put in; the headers, at the start, most."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, len(data) - 1)
        at = draw(st.one_of(st.integers(0, min(last, 400)), st.integers(0, last)))
        data[at : at + draw(st.sampled_from([0, 1, 2, 8, 1 << 30]))] = draw(st.binary(max_size=8))
    return bytes(data)


def value_replaced(draw: st.DrawFn, content: bytes) -> bytes:
    """Of JSON: one value is another, or has gone, or is there twice."""
    held: Any = json.loads(content)
    inner, key = None, None
    while isinstance(held if inner is None else inner[key], (dict, list)):
        parent = held if inner is None else inner[key]
        if not parent or (inner is not None and draw(st.integers(0, 3)) == 0):
            break
        inner, key = parent, draw(st.sampled_from(list(parent) if isinstance(parent, dict) else
                                                  range(len(parent))))  # fmt: skip
    if inner is None:
        return json.dumps(draw(scalars)).encode()
    if draw(st.booleans()):
        inner[key] = draw(scalars)
    else:
        del inner[key]
    return json.dumps(held).encode()


@st.composite
def damaged(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    of_json = name.endswith(".json") and draw(st.booleans())
    return (value_replaced if of_json else bytes_damaged)(draw, content)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named(run: Path, name: str) -> None:
    path = run / name
    whole = path.read_bytes()
    READERS[name](run)

    @seed(39)
    @settings(
        max_examples=TRIES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(content=damaged(name, whole))
    def tried(content: bytes) -> None:
        path.write_bytes(content)
        began = time.monotonic()
        try:
            READERS[name](run)
        except (ValueError, OSError) as error:
            said = str(error)
            assert any(place in said for place in (path.name, str(path.parent), "chat.jsonl")), said
            said.encode()  # it can be printed
        assert time.monotonic() - began < LONGEST_SECONDS

    try:
        tried()
    finally:
        path.write_bytes(whole)
