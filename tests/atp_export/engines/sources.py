"""The sources of the engines that read config.json, from the package index.

`python -m tests.atp_export.engines.sources FOLDER` downloads them: SGLang's wheel,
llama-cpp-python's source (it holds llama.cpp with its converter), and vLLM's source.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "llama-cpp-python": "0.3.36"}
WANTED = {
    "vllm": ("vllm/model_executor/models/", "vllm/transformers_utils/"),
    "sglang": ("sglang/srt/models/", "sglang/srt/configs/"),
    "llama-cpp-python": ("conversion/", "convert_hf_to_gguf.py", "gguf-py/gguf/"),
}


def download(folder: Path) -> None:
    """Each engine's files under folder/NAME."""
    for name, version in VERSIONS.items():
        if (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            found = dict(_files(name, version, Path(beside)))
            for path, text in found.items():
                target = Path(beside) / "wanted" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text)
            (Path(beside) / "wanted").rename(folder / name)


def _files(name: str, version: str, beside: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the package, bytes) of what is wanted."""
    source = ["--no-binary", ":all:"] if name != "sglang" else []
    # vLLM's metadata wants CUDA to be made; pip leaves the unpacked source where it failed.
    kept = ["--no-clean", "--no-build-isolation"] if name == "vllm" else []
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, *kept]
    done = subprocess.run(
        [*command, "--dest", str(beside), f"{name}=={version}"],
        env=os.environ | {"TMPDIR": str(beside)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if kept:
        (root,) = beside.glob("pip-download-*/vllm_*")
        every = ((p.relative_to(root).as_posix(), p.read_bytes()) for p in root.rglob("*.py"))
    else:
        assert done.returncode == 0, done.stderr[-500:]
        every = _unpacked(next(beside.glob(f"{name.replace('-', '_')}*")))
    for path, text in every:
        inner = path.partition("vendor/llama.cpp/")[2] if name == "llama-cpp-python" else path
        if inner.startswith(WANTED[name]):
            yield inner, text


def _unpacked(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            yield from ((n, opened.read(n)) for n in opened.namelist() if n.endswith(".py"))
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.name.endswith(".py") and (read := opened.extractfile(member)):
                    yield member.name, read.read()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    download(Path(sys.argv[1]))
