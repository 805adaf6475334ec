"""Files that are written whole or not at all, in folders that one process at a time works in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a file as large as it may be
PATIENCE = 60.0  # seconds; a run whose driver died finishes its step and saves


def write_json(path: str | Path, data: Any, indent: int | None = 1) -> Path:
    """Write `data` as JSON with `write_bytes`. `indent` None: on one line, which is ten times as fast to make."""
    return write_bytes(path, (json.dumps(data, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all: to a temporary name beside `path`, to the disk, then renamed. Returns `path`.

    Raises `UserError` when the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except FileNotFoundError:
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist; make it first") from None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from None
    try:
        with full_disk(f"cannot write {path}: the disk is full; free space and run the same command again"):
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds. `UserError` when it is missing or cut short."""
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the folder's name") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not readable JSON: it was cut short or changed; delete it and run again") from None


def checksum(path: Path) -> Any:
    """Return the sha256 of a file as hashlib's object: `update` adds bytes to it, `hexdigest` reads it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


@contextmanager
def full_disk(sentence: str) -> Iterator[None]:
    """Raise `UserError(sentence)` in place of an error that means that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(sentence) from None
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a `UserError` of one sentence in place of any error of the disk while `path` is written."""
    full = f"cannot write {path}: the disk is full; free space and run the same command again with --resume"
    try:
        with full_disk(full):
            yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None


def alone(folder: Path, doing: str, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Return `locked`, with the sentence that another process `doing` (such as "trains in") the folder."""
    refusal = f"another process {doing} {folder}: wait until it has ended, or stop it, and give the same command again"
    return locked(folder, refusal, patience)


@contextmanager
def locked(folder: Path, refusal: str, patience: float = PATIENCE) -> Iterator[None]:
    """Make the folder and hold its lock. `UserError(refusal)` when another process holds it for `patience` seconds.

    The lock is freed with the process, however that ends. A file system without locks is reported on stderr, and the
    folder is used; Windows has no locks of this kind.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(refusal) from None
                time.sleep(0.2)
            except OSError as error:
                print(f"{folder} cannot be locked ({error.strerror}): let no second process in", file=sys.stderr)
                break
        yield
    finally:
        os.close(handle)
