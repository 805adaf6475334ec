"""Files of text, compressed or not: .gz, .xz and .zst are read as what is in them."""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, need

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def _zstd(raw: BinaryIO) -> Any:
    if importlib.util.find_spec("compression") is not None:  # Python 3.14
        return importlib.import_module("compression.zstd").open(raw, "rb")
    return need("pyarrow", "data").CompressedInputStream(raw, "zstd")


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.open(raw, "rb"),
    ".xz": lambda raw: lzma.open(raw, "rb"),
    ".bz2": lambda raw: bz2.open(raw, "rb"),
    ".zst": _zstd,
}


def kind_inside(path: Path) -> str:
    """Return the ending of a file's name that says what is in it: .jsonl of a.jsonl and of a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the bytes of a file as they were before they were compressed, and the file, to ask how far it was read.

    Raises `UserError` where it cannot be read, is damaged or was cut short.
    """
    try:
        raw = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable or leave it out") from None
    with raw:
        if path.suffix not in OPENERS:
            yield raw, raw
            return
        try:
            yield OPENERS[path.suffix](raw), raw
        except (*DAMAGED, OSError) as error:
            said = str(error).partition("\n")[0]
            raise UserError(
                f"{path} is damaged or was cut short ({said}): bring the whole file back, or leave it out"
            ) from None


def read_chunks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield what `stream` holds, `size` bytes at a time or fewer; the last one is empty."""
    while chunk := stream.read(size):
        yield chunk
    yield b""


def lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the lines of `stream`, each with its line feed."""
    held: list[bytes] = []
    for chunk in read_chunks(stream, size):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*held, line, b"\n"])
            held = []
        held.append(rest)
    if last := b"".join(held):
        yield last
