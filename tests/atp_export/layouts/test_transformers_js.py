"""transformers.js's layout: the same model under the names that it looks for."""

from __future__ import annotations

import functools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import onnxruntime as ort
import pytest
from atp_export.export import export_onnx
from atp_export.layouts.transformers_js import check_transformers_js, to_transformers_js
from atp_export.runtime import Session, generate_tokens
from transformers import AutoTokenizer

from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.narrow import narrow_model
from atp_edge.pipeline.model_card_use import PLAIN_JS
from tests.tiny import PLANS, tiny_model

TEXT, NEW = "The licence of 2024: free software, naïve and", 8
NODE = Path(os.environ.get("ATP_NODE_FOLDER_LARGE", "build/large/node")).absolute()
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


PLAIN: dict[str, Any] = json.loads(re.sub(r"(\w+):", r'"\1":', PLAIN_JS))
"""A browser wants the data file named too (docs/deploy.md)."""
IN_BROWSER = PLAIN | {
    "session_options": {"externalData": [{"path": "model.onnx.data", "data": "model.onnx.data"}]}
}


def laid_out(
    root: Path, real_folder: Path, widths: str, precision: str, *, plain: bool = False
) -> tuple[Path, list[int]]:
    """(folder, greedy tokens of the model before its files were renamed, unless plain)."""
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    dense = tiny_model("llama", tied=True, vocab_size=len(tokenizer))
    save_narrow(narrow_model(dense, PLANS[widths](dense)), tokenizer, root / "slim")
    folder = root / "model"
    export_onnx(root / "slim", folder, flavour="portable", precision=precision)  # type: ignore[arg-type]
    ids = tokenizer(TEXT)["input_ids"]
    (tokens,) = generate_tokens(Session(folder), [ids], max_new_tokens=NEW)
    if not plain:
        to_transformers_js(folder, precision)
    return folder, tokens


def test_names_and_configuration_are_those_that_it_looks_for(
    tmp_path: Path, real_folder: Path
) -> None:
    folder, _ = laid_out(tmp_path, real_folder, "per-layer", "int4")
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*model*")}
    assert names == {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}
    config = json.loads((folder / "config.json").read_text())
    named = {"dtype": "q4", "use_external_data_format": True}
    assert config["transformers.js_config"] == named
    session = ort.InferenceSession(str(folder / "onnx" / "model_q4.onnx"))
    assert "past_key_values.0.key" in {i.name for i in session.get_inputs()}


def test_a_precision_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="with bf16: expected one of fp32, fp16, int8, int4"):
        check_transformers_js("bf16")


def need_package() -> None:
    if not (NODE / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs @huggingface/transformers under build/large/node")


@pytest.mark.large
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("widths", "precision"), [("per-layer", "fp32"), ("per-layer", "int4"), ("uniform", "fp16")]
)
def test_its_own_generate_gives_the_same_tokens(
    tmp_path: Path, real_folder: Path, widths: str, precision: str, plain: bool
) -> None:
    need_package()
    if shutil.which("node") is None:
        pytest.skip("needs node")
    folder, tokens = laid_out(tmp_path, real_folder, widths, precision, plain=plain)
    script = Path(__file__).with_name("transformers_js.mjs").absolute()
    done = subprocess.run(
        ["node", str(script), str(folder), str(NEW), TEXT],
        cwd=NODE, capture_output=True, text=True, check=False,
        env=os.environ | ({"OPTIONS": json.dumps(PLAIN)} if plain else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == AutoTokenizer.from_pretrained(real_folder)(TEXT)["input_ids"]
    assert found["tokens"] == tokens


class Served(SimpleHTTPRequestHandler):
    """The page, the model under /models/model/, node_modules; what is posted is the answer."""

    def __init__(self, *args: Any, model: Path, answers: queue.Queue[str], **kwargs: Any) -> None:
        self.model, self.answers = model, answers
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        path = path.partition("?")[0]
        if path == "/":
            return str(Path(__file__).with_name("in_browser.html"))
        if path.startswith("/models/model/"):
            return str(self.model / path.removeprefix("/models/model/"))
        return str(NODE / path.lstrip("/"))

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        self.answers.put(self.rfile.read(size).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def answers_of(model: Path) -> Iterator[tuple[str, queue.Queue[str]]]:
    """(address on this machine, what the page posts)."""
    answers: queue.Queue[str] = queue.Queue()
    handler = functools.partial(Served, model=model, answers=answers)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", answers
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.large
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("widths", "precision"), [("per-layer", "fp32"), ("per-layer", "int4")])
def test_a_real_browser_gives_the_same_tokens(
    tmp_path: Path, real_folder: Path, widths: str, precision: str, plain: bool
) -> None:
    """Headless Chromium on WASM, one thread."""
    need_package()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium: on Debian, apt-get install chromium-headless-shell")
    folder, tokens = laid_out(tmp_path, real_folder, widths, precision, plain=plain)
    options = json.dumps(IN_BROWSER if plain else {})
    with answers_of(folder) as (address, answers):
        page = f"{address}?{urlencode({'text': TEXT, 'new': NEW, 'options': options})}"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        asked = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile,
                 "--remote-debugging-port=0", page]  # fmt: skip
        # Its own session: what stands in the path may be a script that starts the browser.
        with subprocess.Popen(
            asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as run:
            try:
                found = json.loads(answers.get(timeout=300))
            finally:
                os.killpg(run.pid, signal.SIGTERM)
    assert found.get("error") is None, found["error"]
    assert "Chrome" in found["agent"]
    assert found["ids"] == AutoTokenizer.from_pretrained(real_folder)(TEXT)["input_ids"]
    assert found["tokens"] == tokens
