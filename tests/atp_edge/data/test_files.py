"""Bytes as people save them: encodings, compression, line ends; damage is named with its place."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from atp_edge.data.files import kind_of, lines_of, text_of

TEXT = "one é\ntwo 日本\n"


def zst(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_every_marked_encoding_is_read_and_its_mark_is_no_text(
    tmp_path: Path, encoding: str
) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    path = written(tmp_path, "a.txt", (mark + TEXT).encode(encoding))
    assert text_of(path) == TEXT
    assert [line.text for line in lines_of(path)][:2] == ["one é", "two 日本"]


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.txt.zst", zst)])
def test_compressed_files_are_read_and_damaged_ones_named(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(TEXT.encode() * 500)
    assert text_of(written(tmp_path, name, whole)) == TEXT * 500
    assert text_of(written(tmp_path, name, whole + whole)) == TEXT * 1000
    assert kind_of(tmp_path / name) == ".txt"
    for damaged in (whole[: len(whole) // 2], b"no such thing", whole + b"x" * 9):
        path = written(tmp_path, name, damaged)
        with pytest.raises(OSError, match=rf"{name}: damaged"):
            text_of(path)
        with pytest.raises(OSError, match=rf"{name}: damaged"):
            list(lines_of(path))


def test_a_flipped_bit_fails_the_checksum(tmp_path: Path) -> None:
    flipped = bytearray(gzip.compress(TEXT.encode() * 500))
    flipped[len(flipped) // 2] ^= 0xFF
    with pytest.raises(OSError, match=r"a.txt.gz: damaged .*CRC"):
        text_of(written(tmp_path, "a.txt.gz", bytes(flipped)))


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", "a\u2028b\x85c\x0bd\r\ne\x1cf\n\ng".encode())
    assert [line.text for line in lines_of(path)] == ["a\u2028b\x85c\x0bd", "e\x1cf", "", "g"]
    assert [line.number for line in lines_of(path)] == [1, 2, 3, 4]


def test_bytes_of_another_encoding_are_named_with_line_and_offset(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "eins\nzwei\nfünf\n".encode("latin-1"))
    message = r"a.txt, line 3: byte 0xfc at byte offset 11 is no UTF-8 .*iconv -f latin1"
    with pytest.raises(ValueError, match=message):
        text_of(path)
    lines = list(lines_of(path))
    assert [line.text for line in lines] == ["eins", "zwei", ""]
    assert "byte 0xfc at byte offset 11" in lines[2].fault


def test_half_of_a_utf_16_file_is_named(tmp_path: Path) -> None:
    data = "one\ntwo\nthree".encode("utf-16")
    path = written(tmp_path, "a.txt", data[:-1])
    with pytest.raises(
        ValueError, match=r"a.txt, line 3: byte 0x65 at byte offset 26 is no UTF-16"
    ):
        text_of(path)


def test_utf_16_without_its_mark_is_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "one\ntwo".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a.txt, line 1: holds NUL characters; expected text"):
        text_of(path)
