"""What is written is whole or not there, replaces regular files alone, and is cleaned up after a kill."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnlab import unfinished
from attnlab.errors import UserError
from attnlab.files import (
    alone,
    check_free,
    check_target,
    path_within,
    read_json,
    regular,
    whole_folder,
    write_bytes,
    write_json,
)
from attnlab.formatting import escaped

POSIX = pytest.mark.skipif(os.name != "posix", reason="other systems have no such files, or no locks of this kind")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def linked(path: Path) -> None:
    (path.parent / "target").write_text("theirs")
    path.symlink_to("target")


def nowhere(path: Path) -> None:
    path.symlink_to("missing")


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


def protected(path: Path) -> None:
    path.write_text("theirs")
    path.chmod(0o444)


STANDING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder": (Path.mkdir, "is a folder, and only a regular file is replaced: name another file"),
    "a named pipe": (pipe, "is a named pipe, and only a regular file is replaced"),
    "a socket": (bound, "is a socket, and only a regular file is replaced"),
    "a link": (linked, "is a symbolic link, and only a regular file is replaced"),
    "a link to nothing": (nowhere, "is a symbolic link, and only"),
    "a link to a device": (device, "is a symbolic link, and only"),
    "a read-only file": (protected, "is read-only, so it is not replaced: make it writable, or name another file"),
}


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.iterdir()}


@POSIX
@pytest.mark.parametrize("name", STANDING)
def test_only_a_regular_file_or_nothing_is_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make, said = STANDING[name]
    make(Path("out"))
    before = seen(tmp_path)
    for write in (
        lambda: write_json("out", {"a": 1}),
        lambda: write_bytes(Path("out"), b"x"),
        lambda: check_target("out"),
    ):
        with pytest.raises(UserError, match=said):
            write()
    assert seen(tmp_path) == before
    assert not (tmp_path / "target").exists() or (tmp_path / "target").read_text() == "theirs"


@POSIX
def test_a_target_is_asked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held").write_text("mine")
    for path in (tmp_path / "held", tmp_path / "new", tmp_path / ("n" * 200)):
        assert write_bytes(check_target(path), b"1").read_bytes() == b"1"
    for path, said in (
        (tmp_path / "no" / "x", "the folder .*no does not exist; make it first"),
        (tmp_path / "held" / "x", "the folder .*held does not exist"),
        (tmp_path / ("n" * 300), "File name too long; choose another name"),
        (tmp_path / "a\0b", "null byte; choose another name"),
        (Path(), "is a folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_target(path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="is not yours to write to"):
        check_target(tmp_path / "new2")


@POSIX
@pytest.mark.parametrize("name", ["a named pipe", "a socket", "a link to a device"])
def test_nothing_endless_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    STANDING[name][0](Path("given"))
    with pytest.raises(UserError, match=r"given is a (named pipe|socket|device), and reading it may never end"):
        read_json("given")
    linked(tmp_path / "fine")
    for path in (tmp_path / "fine", tmp_path, tmp_path / "missing", tmp_path / "a\0b"):
        assert regular(path) == path


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    for name in ("model-00001.safetensors", "sub/part.bin", "..model", "a..b", "ü"):
        assert path_within(tmp_path, name, "index.json") == tmp_path / name
    away: tuple[Any, ...] = ("../x", "/etc/hostname", "a/../../x", "sub/..", "..", "", ".", "..\\x", "D:x", "a\0b", 5)
    for name in (*away, None, ["x"], "x" * 256):
        with pytest.raises(UserError, match=r"^index.json names .*, which is no file in its own folder"):
            path_within(tmp_path, name, "index.json")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with whole_folder(out) as half:
        (half / "sub").mkdir()
        (half / "sub" / "x").write_text("1")
        assert not out.exists() and half.parent == out.parent
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "sub" / "x").read_text() == "1"
    for error, told in (
        (ZeroDivisionError(), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
    ):
        with pytest.raises(told), whole_folder(tmp_path / "new" / "deep" / "out") as half:
            (half / "x").write_text("1")
            raise error
        assert [path.name for path in tmp_path.iterdir()] == ["a"], "folders above it are not left either"
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as half:
        (half / "x").write_text("2")
    assert (tmp_path / "empty" / "x").read_text() == "2"


@POSIX
def test_only_a_free_place_becomes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = seen(tmp_path)
    for name in ("file", "full", "link", "dangling"):
        with (
            pytest.raises(UserError, match="exists already; name a new or an empty folder"),
            whole_folder(tmp_path / name),
        ):
            pytest.fail("it was let in")
    for path in (Path(), Path("/"), Path("..")):
        with pytest.raises(UserError, match="is no name for a new folder"):
            check_free(path)
    with pytest.raises(UserError, match="cannot be made"), whole_folder(tmp_path / "file" / "x"):
        pytest.fail("it was let in")
    assert seen(tmp_path) == before


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_all_files_of_a_folder_have_the_modes_of_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with whole_folder(tmp_path / "out") as half:
            for name, mode in (("secret", 0o600), ("open", 0o777), ("fixed", 0o444)):
                (half / name).touch(mode)
            (half / "sub").mkdir(0o700)
            write_bytes(half / "sub" / "x", b"")
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


KILLED = """
import os, signal, sys
from pathlib import Path
from attnlab.files import whole_folder, write_bytes
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # as it is about to appear
if sys.argv[2] == "file":
    write_bytes(Path(sys.argv[1]) / "out", b"x" * 1000)
with whole_folder(Path(sys.argv[1]) / "out") as half:
    (half / "sub").mkdir()
    (half / "sub" / "x").write_text("1")
"""


@POSIX
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_command_left_is_removed_by_the_next(kind: str, tmp_path: Path) -> None:
    (tmp_path / ".out.mine").mkdir()
    (tmp_path / ".out.mine" / "x").touch()
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / ".out.attnlab-notes").write_text("of somebody")
    mine = {".out.mine", "out.unfinished", ".out.attnlab-notes"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), kind])
    assert done.returncode == -signal.SIGKILL
    (left,) = {path.name for path in tmp_path.iterdir()} - mine
    assert left.startswith(".out.attnlab-") and (tmp_path / left).is_dir() == (kind == "folder")
    write_bytes(tmp_path / "another", b"2")
    assert {path.name for path in tmp_path.iterdir()} == mine | {"another"}


@POSIX
def test_what_is_still_being_written_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as half:
        (half / "x").write_text("1")
        write_bytes(tmp_path / "other", b"2")
        unfinished.clean(tmp_path)
        assert (half / "x").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}
    (tmp_path / ".x.attnlab-12345678").symlink_to("out")
    os.mkfifo(tmp_path / ".y.attnlab-12345678")
    unfinished.clean(tmp_path)
    assert (tmp_path / "out" / "x").exists() and (tmp_path / ".x.attnlab-12345678").is_symlink()
    unfinished.clean(tmp_path / "nowhere")


def test_an_abandoned_process_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"), whole_folder(tmp_path / "out") as half:
        (half / "x").write_text("1")
        unfinished.abandon()
        assert not half.exists()
    assert not list(tmp_path.iterdir())


@POSIX
def test_a_lock_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "a" / "b", "trains in"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()), "neither the lock nor the folders made for it"
    (tmp_path / "held").mkdir()
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "held", "trains in"):
        raise ZeroDivisionError
    assert not list((tmp_path / "held").iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match="exists and is not a folder"), alone(tmp_path / name, "trains in"):
            pytest.fail("it was let in")
    with pytest.raises(UserError, match="cannot be written"), alone(tmp_path / "file" / "x", "trains in"):
        pytest.fail("it was let in")


@POSIX
def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path) -> None:
    """One waits; the holder fails and removes the file; a third makes a new one: two must not hold it at once."""
    begun, go, inside = threading.Event(), threading.Event(), []

    def fail() -> None:
        with pytest.raises(ZeroDivisionError), alone(tmp_path, "works in"):
            begun.set()
            go.wait()
            raise ZeroDivisionError

    def wait() -> None:
        with alone(tmp_path, "works in", patience=30):
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=each) for each in (fail, wait, wait)]
    threads[0].start()
    begun.wait()
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    with alone(tmp_path, "works in", patience=0):
        assert not inside


def test_a_name_with_line_breaks_is_said_on_one_line() -> None:
    assert escaped("a\nb\tc\x1b[2Jd\r\x7f\u2028e") == r"a\nb\tc\x1b[2Jd\r\x7f\u2028e"
    assert escaped("données 数据 'a b'") == "données 数据 'a b'"
