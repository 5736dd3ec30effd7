"""The shell blocks of the users' pages, typed as they stand there, in the order of the pages."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atp_edge.cli import app
from tests.sources import save_source
from tests.tiny_tokenizers import tokenizer_of

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guide.md", "docs/deploy.md", "docs/gguf.md")
# Why the blocks of another page are not typed here; test_docs.py knows their commands and flags.
ELSEWHERE = {
    "CONTRIBUTING.md": "lint and doctor, as every session types them",
    "docs/recovery.md": "trainings of hours; bench quality --quick is tests/atp_bench/quality",
    "docs/scale.md": "models of 1B and more; tests/atp_edge/pipeline/test_real_size.py",
    "docs/several-devices.md": "several processes; tests/atp_edge/pipeline/test_launch.py",
}
# Other programs: the wheel and its extras are tests/test_wheel.py, Node tests/atp_export.
NOT_OURS = ("pip", "npm", "make", "llama-cli", "ollama", "python")
QUICK = [
    "--dataset-block-tokens", "16", "--dataset-test-blocks", "2", "--train-precision", "no",
    "--steps", "4", "--decision-width-multiple", "4", "--decision-importance-blocks", "2",
    "--lora-rank", "2", "--gate-config", "quick_gate.toml", "--recovery-reconstruct-blocks", "2",
    "--recovery-approach-blocks", "2", "--bench-prompt-tokens", "8", "--bench-new-tokens", "4",
    "--bench-rounds", "1",
]  # fmt: skip
NEEDS = {"openvino": "openvino_genai", "gguf": "gguf"}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_shell_block_is_typed_or_said_why_not() -> None:
    with_blocks = {
        page.relative_to(ROOT).as_posix()
        for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
        if "```sh\n" in page.read_text()
    }
    assert with_blocks == {*PAGES, *ELSEWHERE}
    for page in PAGES:
        assert {words[0] for words in commands(page)} <= {"atp-edge", *NOT_OURS}


@pytest.mark.large
def test_what_the_pages_type_does_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run and five exports of it: about a minute and a half of CPU."""
    monkeypatch.chdir(tmp_path)
    save_source(Path("MODEL"), tokenizer=tokenizer_of("byte-level", bos=False))
    shutil.copy(ROOT / "tests" / "stored_runs" / "data.jsonl", "notes.jsonl")
    shutil.copy(ROOT / "tests" / "quick_gate.toml", ".")
    told = {"RUN": "runs/notes", "onnx": "runs/notes/onnx", "DIR": "dir"}
    written = set()
    for words in (words for page in PAGES for words in commands(page) if words[0] == "atp-edge"):
        line = [told.get(word, word) for word in words[1:]]
        if any(word in line and find_spec(module) is None for word, module in NEEDS.items()):
            continue
        if line[0] == "run":
            line += [*([] if "--model" in line else ["--model", "MODEL"]), *QUICK]
        done = CliRunner().invoke(app, line)
        assert done.exception is None, (line, done.output, done.exception)
        if "--to" in line:
            written.add(line[line.index("--to") + 1])
            assert (Path(line[line.index("--to") + 1]) / "figures.json").is_file()
    assert "notes-int4" in written
