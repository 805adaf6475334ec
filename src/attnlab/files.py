"""Files and folders that are written whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from .errors import UserError, quoted
from .ranges import check_value
from .unfinished import begin, drop_empty, forget, make_folders, probe, settle, sync_folder, umask

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, a file as large as it may be
PATIENCE = 60.0  # seconds; a run whose driver died finishes its step and saves
LOCK = ".lock"
LONGEST = 255  # bytes of a file's name

# writing


def write_json(path: str | Path, data: Any, indent: int | None = 1) -> Path:
    """Write `data` as JSON with `write_bytes`. `indent` None: on one line, which is ten times as fast to make."""
    return write_bytes(path, (json.dumps(data, indent=indent, allow_nan=False) + "\n").encode())


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all: to a temporary name beside `path`, to the disk, then renamed. Returns `path`.

    Raises `UserError` when the folder cannot be written to, when the disk is full, and where anything but a regular
    file that may be written stands at `path`.
    """
    path = Path(path)
    _check_replaceable(path)
    try:
        handle, half = begin(path, folder=False)
    except OSError as error:
        raise UserError(_no_place(path, error)) from None
    try:
        with full_disk(f"cannot write {path}: the disk is full; free space and run the same command again"):
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.chmod(half, 0o666 & ~umask())
                os.fsync(file.fileno())
                if os.name == "posix":  # others rename no open file
                    os.replace(half, path)
            if os.name != "posix":
                os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    finally:
        forget(half)
    return path


def check_target(path: str | Path) -> Path:
    """Return `path`, which `write_bytes` may write. `UserError` where it may not; to be asked before the work."""
    path = Path(path)
    _check_replaceable(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {path.parent} is not yours to write to; choose another")
    try:
        probe(path.parent)
    except OSError as error:
        raise UserError(_no_place(path, error)) from None
    return path


def _no_place(path: Path, error: OSError) -> str:
    """Return the sentence that nothing can be made beside `path`, and why."""
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return f"cannot write {path}: the folder {path.parent} does not exist; make it first"
    if isinstance(error, NotADirectoryError):
        return f"cannot write {path}: {path.parent} is not a folder; choose another"
    if error.errno in DISK_FULL:
        return f"cannot write {path}: the disk is full; free space and run the same command again"
    if error.errno == errno.ENAMETOOLONG:
        return f"cannot write {path}: its name is too long; give a shorter one"
    return f"cannot write {path}: the folder {path.parent} takes no new files; choose another"


def _check_replaceable(path: Path) -> None:
    """Raise `UserError` where a regular file that may be written, or nothing, is not what stands at `path`."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}; choose another name") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {file_kind(mode)}, and only a regular file is replaced: name another file")
    if not mode & 0o222 or not os.access(path, os.W_OK):
        raise UserError(f"{path} is read-only, so it is not replaced: make it writable, or name another file")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`, which gets that name once all of it is on the disk; this is the one way to
    write a folder. After an error nothing is left. Its files have the modes of new files, whoever made them.

    Raises `UserError` where `folder` is not free, or cannot be written.
    """
    check_free(folder)
    made: list[Path] = []
    try:
        made = make_folders(folder.parent)
        handle, half = begin(folder, folder=True)
    except OSError as error:
        drop_empty(made)
        raise UserError(f"{folder} cannot be made ({error.strerror}); name a folder that you may write to") from None
    try:
        yield half
        settle(half)
        os.replace(half, folder)
        sync_folder(folder.parent)
        made = []
    except OSError as error:
        why = "the disk is full" if error.errno in DISK_FULL else str(error.strerror or error)
        raise UserError(f"cannot write {folder} ({why}); free space or choose another folder") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)
        forget(half)
        drop_empty(made)
        if handle >= 0:
            os.close(handle)


def check_free(folder: Path) -> None:
    """Raise `UserError` where anything but an empty folder stands at `folder`, and where none can be made."""
    if folder.name in ("", ".."):
        raise UserError(f"{folder} is no name for a new folder; name one, such as {folder / 'out'}")
    try:
        mode = os.lstat(folder).st_mode
        if stat.S_ISDIR(mode) and not os.listdir(folder):
            return
    except (FileNotFoundError, NotADirectoryError):
        above = next(each for each in folder.absolute().parents if os.path.lexists(each))
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(
                f"{folder} cannot be made, because {above} is not a folder that you may write to; name another"
            ) from None
        try:
            probe(above)
        except OSError:
            raise UserError(f"{folder} cannot be made, because {above} takes no new files; name another") from None
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder} cannot be made ({why}); name a folder that you may write to") from None
    raise UserError(f"{folder} exists already; name a new or an empty folder")


# reading


CHANGED = "it was cut short or changed; delete it and run again"


def read_json(path: str | Path, kind: Any = Any, remedy: str = CHANGED) -> Any:
    """Return what a JSON file holds. `UserError` when it is missing, cannot be read, or is not of this `kind`.

    `kind` is an annotation: a `TypedDict`, `dict[str, str]`, `list[...]`. `remedy` says what to do with a wrong file.
    """
    path = regular(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: check the folder's name") from None
    except OSError as error:
        raise UserError(unreadable(path, error)) from None
    except ValueError as error:  # a name with a zero byte
        raise UserError(f"{quoted(str(path))} is no name of a file ({error}): give another") from None
    return parse_json(str(path), text, kind, remedy)


def parse_json(name: str, text: str | bytes, kind: Any = Any, remedy: str = CHANGED) -> Any:
    """Return what JSON says. `UserError`, which begins with `name`, for anything else than JSON of this `kind`."""
    try:
        value = json.loads(text)
        if HALF.search(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{name} is not readable JSON, as it is nested too deeply: {remedy}") from None
    except ValueError as error:  # no JSON, no UTF-8, a half of a character, a number of thousands of digits
        why = str(error) if isinstance(error, json.JSONDecodeError) else "it holds what no file of attnlab's has"
        raise UserError(f"{name} is not readable JSON ({why}): {remedy}") from None
    try:
        return check_value(name, value, kind)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # half of a character, escaped or not


def expanded(path: str | Path) -> Path:
    """Return a path with ~ and ~NAME replaced by the user's folder. `UserError` where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{quoted(str(path))} begins with the folder of a user that is not known here: write the path out"
        ) from None


@contextmanager
def naming(path: str | Path, remedy: str = CHANGED) -> Iterator[None]:
    """Have each `UserError` about what a file holds begin with the file, and end with what to do about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} does not hold what this version reads ({error}): {remedy}") from None


def unreadable(path: Path, error: OSError, way: str = "name another") -> str:
    """Return the sentence that a file cannot be read, which does not mean that it is damaged; `way` is another way."""
    return f"{path} cannot be read ({error.strerror or error}): make it readable, or {way}"


def regular(path: str | Path) -> Path:
    """Return `path`, which may be missing. `UserError` where it is a named pipe, a device or a socket: reading one may
    never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path  # whoever opens it says what is wrong
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is {file_kind(mode)}, and reading it may never end: give a regular file")
    return path


def file_kind(mode: int) -> str:
    """Return what a file that is not regular is, in words; `mode` is its st_mode."""
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def path_within(folder: Path, name: Any, listed: str | Path) -> Path:
    """Return the path of the file `name` in `folder`. `UserError` for a name that leads out of it; `listed` is the file
    that names it."""
    parts = PureWindowsPath(name) if isinstance(name, str) and "\0" not in name else PureWindowsPath("..")
    if parts.anchor or ".." in parts.parts or not parts.parts or max(map(len, parts.parts)) > LONGEST:
        raise UserError(f"{listed} names {name!r}, which is no file in its own folder; take one that was not changed")
    return folder / name


def checksum(path: Path) -> Any:
    """Return the sha256 of a file as hashlib's object: `update` adds bytes to it, `hexdigest` reads it."""
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256")


# the disk


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


# one process at a time


def alone(folder: Path, doing: str, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Return `locked`, with the sentence that another process `doing` (such as "trains in") the folder."""
    refusal = f"another process {doing} {folder}: wait until it has ended, or stop it, and give the same command again"
    return locked(folder, refusal, patience)


@contextmanager
def locked(folder: Path, refusal: str, patience: float = PATIENCE) -> Iterator[None]:
    """Make the folder and hold its lock. `UserError(refusal)` when another process holds it for `patience` seconds, and
    where the folder cannot be made or written to.

    The lock is freed with the process, however that ends. After an error its file is removed again, and so is a folder
    that was made for it and is empty. A file system without locks is reported on stderr, and the folder is used;
    Windows has no locks of this kind.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        yield
        return
    made: list[Path] = []
    known = os.path.lexists(folder / LOCK)
    try:
        made = make_folders(folder)
        handle = _hold(folder, refusal, patience)
    except FileExistsError:
        raise UserError(f"{folder} exists and is not a folder; name a new or an empty folder") from None
    except OSError as error:
        drop_empty(made)
        raise UserError(f"{folder} cannot be written ({error.strerror}); name a folder that you may write to") from None
    try:
        yield
    except BaseException:
        if not known:
            with suppress(OSError):
                (folder / LOCK).unlink()
        drop_empty(made)
        raise
    finally:
        os.close(handle)


def _hold(folder: Path, refusal: str, patience: float) -> int:
    """Return the handle of the folder's lock, held."""
    path = folder / LOCK
    until = time.monotonic() + patience
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = False
        try:
            held = _hold_now(handle, folder)
            held = held and path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))
        finally:
            if not held:  # by another, or the file was removed before it was locked
                os.close(handle)
        if held:
            return handle
        if time.monotonic() > until:
            raise UserError(refusal)
        time.sleep(0.2)


def _hold_now(handle: int, folder: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): let no second process in", file=sys.stderr)
    return True
