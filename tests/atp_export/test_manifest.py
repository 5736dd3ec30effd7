"""A shipped folder is what its manifest lists and nothing else; nothing outside it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from atp_export.manifest import check_sizes, verify_manifest, write_manifest

GOOD = {"sha256": "a" * 64, "bytes": 1}


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx").write_text("m")
    (folder / "sub" / "tokenizer.json").write_text("t")
    (tmp_path / "secret.txt").write_text("s")
    write_manifest(folder, {"source_model": "tiny"})
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_untouched_folder_gives_its_provenance(shipped: Path) -> None:
    assert verify_manifest(shipped) == {"source_model": "tiny"}
    check_sizes(shipped)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("evil.py", r"evil\.py was not shipped: .*manifest\.json does not list it"),
        ("sub/evil.py", r"sub/evil\.py was not shipped"),
        (".hidden", r"\.hidden was not shipped"),
        ("sub/manifest.json", r"sub/manifest\.json was not shipped"),
    ],
)
def test_a_file_that_was_not_shipped_is_found(shipped: Path, place: str, message: str) -> None:
    (shipped / place).write_text("x")
    with pytest.raises(ValueError, match=message):
        verify_manifest(shipped)


def test_a_folder_or_a_pipe_that_was_not_shipped_is_found(shipped: Path) -> None:
    (shipped / "etc").symlink_to("/etc")
    with pytest.raises(ValueError, match=r"onnx/etc was not shipped"):
        verify_manifest(shipped)
    (shipped / "etc").unlink()
    os.mkfifo(shipped / "pipe")
    with pytest.raises(ValueError, match=r"onnx/pipe was not shipped"):
        verify_manifest(shipped)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("x"), r"model\.onnx is not what was shipped"),
        (
            lambda path: path.write_text("mm"),
            r"model\.onnx \(2 bytes\) is not what was shipped",
        ),
        (lambda path: path.unlink(), r"model\.onnx is missing; the manifest lists it"),
    ],
)
def test_a_changed_or_missing_file_is_found(
    shipped: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(shipped / "model.onnx")
    with pytest.raises(ValueError, match=message):
        verify_manifest(shipped)


def test_sizes_alone_are_looked_at_where_that_is_asked(shipped: Path) -> None:
    (shipped / "model.onnx").write_text("x")
    (shipped / "adapter.onnx_adapter").write_text("of the user")
    check_sizes(shipped)
    (shipped / "model.onnx").write_text("")
    with pytest.raises(ValueError, match=r"model\.onnx \(0 bytes\) is not what was shipped"):
        check_sizes(shipped)


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/hostname", "sub/../model.onnx", "./model.onnx", "", ".",
             "a\0b", "..\\secret.txt", "C:/secret.txt", "sub//tokenizer.json"],
)  # fmt: skip
def test_a_name_that_leads_out_is_refused(shipped: Path, name: str) -> None:
    rewritten(shipped, lambda content: content["files"].update({name: GOOD}))
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest .* leads out of the fold"):
        verify_manifest(shipped)


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/hostname"])
def test_a_link_that_leads_out_is_refused(shipped: Path, target: str) -> None:
    (shipped / "model.onnx").unlink()
    (shipped / "model.onnx").symlink_to(target)
    size = (shipped / "model.onnx").stat().st_size
    rewritten(shipped, lambda c: c["files"]["model.onnx"].update({"bytes": size}))
    with pytest.raises(ValueError, match=r"model\.onnx leads to .*, out of the folder"):
        verify_manifest(shipped)


def test_a_link_within_the_folder_is_its_target(shipped: Path) -> None:
    (shipped / "model.onnx").rename(shipped / "blob")
    (shipped / "model.onnx").symlink_to("blob")
    write_manifest(shipped, {})
    verify_manifest(shipped)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
def test_what_is_no_regular_file_is_never_opened(shipped: Path, name: str, kind: str) -> None:
    path = shipped / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        verify_manifest(shipped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1}', "provenance: expected texts by name"),
        ('{"schema": 1, "provenance": {}, "files": {}}', "files: expected one or more, by name"),
        ('{"schema": 1, "provenance": {}, "files": []}', "files: expected one or more"),
        ('{"schema": 1, "provenance": {}}', "files: expected one or more"),
        ('{"schema": 1, "provenance": {"a": 1}, "files": {}}', "provenance: expected texts"),
        ('{"schema": 99, "provenance": {}, "files": {}}', "schema 99, expected 1"),
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ('{"schema": 1, "files": {"x', "is no JSON text: Unterminated string"),
        ("", "is no JSON text"),
        ("[" * 100_000, "is no JSON text: maximum recursion"),
        ('{"schema": 1, "provenance": {}, "files": {"a": 3}}', "'a': expected its bytes and its"),
        (
            '{"schema": 1, "provenance": {}, "files": {"a": {"sha256": 5, "bytes": true}}}',
            "'a': expected its bytes",
        ),
        (
            '{"schema": 1, "provenance": {}, "files": {"a": {"sha256": "b", "bytes": 1}}}',
            "'a': expected its bytes",
        ),
    ],
)
def test_what_is_no_manifest_is_one_error(shipped: Path, text: str, message: str) -> None:
    (shipped / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json .*{message}"):
        verify_manifest(shipped)


def test_a_file_of_that_name_further_down_is_a_file(shipped: Path) -> None:
    (shipped / "sub" / "manifest.json").write_text("{}")
    write_manifest(shipped, {})
    verify_manifest(shipped)
    (shipped / "sub" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sub/manifest\.json is not what was shipped"):
        verify_manifest(shipped)


def test_bytes_that_are_no_text_are_one_error(shipped: Path) -> None:
    (shipped / "manifest.json").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"manifest\.json is no JSON text"):
        verify_manifest(shipped)


def as_in_the_hubs_cache(folder: Path, cache: Path) -> Path:
    """snapshots/REVISION of links to blobs, as huggingface_hub lays files."""
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = cache / "blobs" / f"{i:040}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob.resolve())
    return snapshot


def test_a_folder_of_links_as_in_the_hubs_cache_is_taken(shipped: Path, tmp_path: Path) -> None:
    snapshot = as_in_the_hubs_cache(shipped, tmp_path / "models--a--b")
    assert verify_manifest(snapshot) == {"source_model": "tiny"}
    (snapshot / "model.onnx").unlink()
    (snapshot / "model.onnx").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="out of the folder"):
        verify_manifest(snapshot)
