"""Files, written whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


def write_json(path: str | Path, data: Any, indent: int | None = 1) -> Path:
    """Write whole or not at all: to a temporary name beside `path`, to the disk, then renamed. `indent` None: on one
    line, which is ten times as fast to make."""
    return write_bytes(path, (json.dumps(data, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
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
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"cannot write {path}: the disk is full; free space and run the same command again"
            ) from None
        raise
    return path


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the folder's name") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not readable JSON: it was cut short or changed; delete it and run again") from None


PATIENCE = 60.0  # seconds; a run whose driver died finishes its step and saves


@contextmanager
def alone(folder: Path, doing: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the folder, which is made. `UserError` where another process still holds it after `patience` seconds.

    Where the file system has no locks, that is said and the folder is used; Windows has none of this kind.
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
                    raise UserError(
                        f"another process {doing} {folder}: wait until it has ended, or stop it, and give the same "
                        "command again"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                print(f"{folder} cannot be locked ({error.strerror}): let no second process in", file=sys.stderr)
                break
        yield
    finally:
        os.close(handle)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk, in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"cannot write {path}: the disk is full; free space and run the same command again with --resume"
            ) from None
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None
