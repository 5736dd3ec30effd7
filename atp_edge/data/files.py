"""A file's bytes as text: decompressed, decoded by its byte order mark; errors name the place."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

COMPRESSED = (".gz", ".zst")
# UTF-32's little-endian mark begins with UTF-16's, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def kind_of(path: Path) -> str:
    """The ending that says what a file holds: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@dataclass(frozen=True)
class Line:
    """A line of a file without its end; `fault` where its bytes are no text."""

    number: int
    text: str
    fault: str = ""


def lines_of(path: Path) -> Iterator[Line]:
    """Lines that end in \\n or \\r\\n and in nothing else: U+2028 may stand inside JSON strings.

    Raises OSError for a damaged file, ValueError for bytes that are not of the marked encoding.
    """
    with _opened(path) as file:
        encoding = _encoding(file)
        if encoding in ("utf-16", "utf-32"):
            decoded = _decoded(path, file.read(), encoding)
            yield from (Line(i, text) for i, text in enumerate(decoded.split("\n"), 1))
            return
        offset = 0
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Line(number, "", _undecodable(error, offset + error.start))
            else:
                yield Line(number, text.rstrip("\r\n"))
            offset += len(raw)


def text_of(path: Path) -> str:
    """A whole file as text, \\r\\n as \\n. Raises OSError or ValueError as `lines_of` does."""
    with _opened(path) as file:
        encoding = _encoding(file)
        text = _decoded(path, file.read(), encoding)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"{path}, line {line}: holds NUL characters; expected text. UTF-16 is told by its byte "
            "order mark: save the file as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file. Raises OSError naming one that is damaged."""
    try:
        with _stream(path) as file:
            yield file
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise OSError(f"{path}: damaged ({error}); compress the data anew") from None


def _stream(path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            import pyarrow

            file = pyarrow.OSFile(str(path))
            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        case _:
            return path.open("rb")


def _encoding(file: Any) -> str:
    head = file.peek(4)[:4]
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def _decoded(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        # The start decodes; UTF-16's last half character is left out of the count.
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(f"{path}, line {line}: {_undecodable(error, error.start)}") from None


def _undecodable(error: UnicodeDecodeError, offset: int) -> str:
    given = error.object[error.start]
    return (
        f"byte {given:#04x} at byte offset {offset} is no {error.encoding.upper()} "
        f"({error.reason}); save the file as UTF-8, say with iconv -f latin1 -t utf-8"
    )
