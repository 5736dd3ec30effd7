"""What `pip install .` installs: built from tree and sdist alike, it runs from its own files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = ("atp_edge", "kernels", "export", "bench", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def built(kind: str, tree: Path, out: Path) -> Path:
    """Build in a tree by the declared backend; returns the file."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=tree, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return out / done.stdout.splitlines()[-1]


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree as it is committed, without what lies around in it."""
    pytest.importorskip("setuptools", reason="setuptools builds it, and is not installed here")
    tree, out = (tmp_path_factory.mktemp(name) for name in ("tree", "out"))
    ignore = shutil.ignore_patterns("__pycache__", "results", "suites")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    sdist = built("sdist", tree, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    from_sdist = built("wheel", unpacked, out)
    (out / "tree").mkdir()
    assert names(built("wheel", tree, out / "tree")) == names(from_sdist)
    return from_sdist


def test_the_wheel_has_every_file_that_the_packages_read(wheel: Path) -> None:
    there = names(wheel)
    for top in ("atp_edge", "kernels/atp_kernels", "export/atp_export", "bench/atp_bench"):
        package = ROOT / top
        for path in package.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store":
                name = f"{package.name}/{path.relative_to(package).as_posix()}"
                assert name in there, name
    assert not any(name.startswith(("tests/", "docs/")) for name in there)


def test_what_is_installed_runs_from_its_own_files(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import atp_bench, atp_edge, atp_export, atp_kernels, sys\n"
        "print(*(m.__file__ for m in (atp_edge, atp_kernels, atp_export, atp_bench)))\n"
        "sys.argv = ['atp-edge', '--version']\n"
        "from importlib.metadata import entry_points\n"
        "(script,) = {e for e in entry_points(group='console_scripts') if e.name == 'atp-edge'}\n"
        "script.load()()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files, version = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(site) for file in files.split())
    assert version.startswith("atp-edge ")


@pytest.mark.parametrize(
    ("extra", "wanted"), [("cpu", {"onnxruntime"}), ("gpu", {"onnxruntime-gpu", "triton"})]
)
def test_an_extra_of_the_wheel_resolves_beside_what_is_installed(
    wheel: Path, extra: str, wanted: set[str]
) -> None:
    """Nothing is installed. torch is here, so that its CUDA build is never asked for."""
    asked = [f"{wheel}[{extra}]", "--dry-run", "--quiet", "--report", "-", "--no-input"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *asked],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    if done.returncode and re.search("connection|resolve host|timed out", done.stderr, re.I):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr
    new = {row["metadata"]["name"].lower() for row in json.loads(done.stdout)["install"]}
    here = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert wanted <= new | here
    assert not new & {"torch", "transformers"}
