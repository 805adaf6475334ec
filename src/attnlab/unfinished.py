"""Files and folders that are being written: hidden, and locked by their writer.

Each has MARK in its name and stands beside the place where it belongs. A command that was killed leaves such a thing
behind, without the lock: the next one that writes there removes it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

MARK = ".attnlab-"
LEFT = re.compile(r"\..*\.attnlab-[a-z0-9_]{8}")  # the name of what is being written, or was left by a killed command
SHOWN = 40  # characters of the name that it will have

_writing: set[Path] = set()  # by this process


def make_folders(folder: Path) -> list[Path]:
    """Make `folder` and those above it. Returns the ones that were not there, the innermost first."""
    missing = []
    for each in (folder, *folder.parents):
        if os.path.lexists(each):
            break
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def drop_empty(folders: list[Path]) -> None:
    """Remove those of `folders` that are empty; the innermost come first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def begin(path: Path, *, folder: bool) -> tuple[int, Path]:
    """Make a hidden file or folder beside `path`, and lock it. Returns its handle, -1 for none, and its path."""
    clean(path.parent)
    prefix = f".{path.name[:SHOWN]}{MARK}"
    while True:
        if folder:
            name = tempfile.mkdtemp(dir=path.parent, prefix=prefix)
            handle = os.open(name, os.O_RDONLY) if os.name == "posix" else -1
        else:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        _writing.add(Path(name))
        if handle < 0 or _lock(handle) is None or os.path.lexists(name):
            return handle, Path(name)
        os.close(handle)  # another command took it for something left, before it was locked
        _writing.discard(Path(name))


def probe(folder: Path) -> None:
    """Raise `OSError` where nothing can be made in a folder, whatever its permissions say."""
    os.rmdir(tempfile.mkdtemp(dir=folder, prefix=f".{MARK}"))


def _lock(handle: int) -> bool | None:
    """Return whether the lock of a file or folder is now held; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def clean(folder: Path) -> None:
    """Remove what killed commands left half-written in `folder`: our mark is in its name, and nobody holds its lock."""
    try:
        names = [name for name in os.listdir(folder) if LEFT.fullmatch(name)]
    except OSError:
        return
    for name in names:
        path = folder / name
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(handle) and os.path.samestat(os.fstat(handle), os.lstat(path)):
                    _remove(path)
            finally:
                os.close(handle)


def abandon() -> None:
    """Remove what this process has half-written, because it ends now."""
    for path in list(_writing):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Give everything in a folder, and itself, the mode of new files and folders, and bring it to the disk."""
    mask = umask()
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(place, name)
            os.chmod(path, 0o666 & ~mask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.chmod(place, 0o777 & ~mask)
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, a rename among them; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def forget(path: Path) -> None:
    """Note that `path` is no longer being written."""
    _writing.discard(path)


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
