"""Files that are written whole or not at all, the folder that one process holds, and what a launcher says."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from attnlab.cli import main as cli
from attnlab.costs.sharding import find_sharding
from attnlab.errors import UserError
from attnlab.files import alone, read_json, write_bytes, write_json
from attnlab.results import (
    Ablation,
    BenchRecord,
    Emergence,
    EvalResult,
    HeadScores,
    LawResult,
    Record,
    RunResult,
    TaskResult,
    environment,
)
from attnlab.runs.launcher import lasting_store, launched, rank, restarted
from attnlab.training import strategies


@dataclass(frozen=True)
class Mine(Record):
    a: int
    b: list[int]


def test_a_record_comes_back_and_later_fields_are_passed_over() -> None:
    record = Mine(1, [2, 3])
    assert record.to_dict() == {"a": 1, "b": [2, 3]} and Mine.from_dict({**record.to_dict(), "later": 4}) == record


RECORDS = [RunResult, TaskResult, LawResult, BenchRecord, HeadScores, Ablation, EvalResult, Emergence]


@pytest.mark.parametrize("kind", RECORDS)
def test_records_are_given_by_name_and_stay_as_they_are(kind: type[Any]) -> None:
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    record = kind(**dict.fromkeys(needed))
    with pytest.raises(TypeError, match="positional"):
        kind(*needed)
    with pytest.raises(FrozenInstanceError):
        setattr(record, needed[0], 1)


@pytest.mark.parametrize("kind", RECORDS)
def test_what_nobody_counted_is_none(kind: type[Any]) -> None:
    """But there is at least one process, one attempt and one sequence."""
    counts = {f.name: f.default for f in fields(kind) if isinstance(f.default, (int, float))}
    assert counts == {name: int(name in ("processes", "attempts", "batch")) for name in counts}


@pytest.mark.parametrize("indent", [1, None])
def test_what_is_written_is_json_in_one_file(indent: int | None, tmp_path: Path) -> None:
    data: Any = {"a": [1, 2.5, None], "ü": "é"}
    path = tmp_path / "x.json"
    assert write_json(path, data, indent) == path == write_json(str(path), data, indent)
    text = path.read_text("utf-8")
    assert read_json(path) == json.loads(text) == data and text.endswith("}\n")
    assert (text.count("\n") == 1) == (indent is None)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    write_json(path, 3)
    assert read_json(str(path)) == 3 and path.read_text().count("\n") == 1
    assert write_json(tmp_path / "default.json", {"a": 1}).read_text() == '{\n "a": 1\n}\n'


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "x", b"old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    for number, said in ((errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EFBIG, "disk is full")):

        def full(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(UserError, match=said):
                write_bytes(path, b"new")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"new")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            write_bytes(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x"] and path.read_bytes() == b"old"
    with pytest.raises(UserError, match=r"nowhere does not exist; make it first"):
        write_bytes(tmp_path / "nowhere" / "x", b"")
    with pytest.raises(UserError, match=r"cannot write .*x/y: .*/x is not a folder; choose another"):
        write_bytes(path / "y", b"")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_may_be_read_by_whoever_may_read_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = write_bytes(tmp_path / "x", b"")
        assert os.umask(mask) == mask, "it is as it was"
        with alone(tmp_path / "held", "works in"):
            pass
    finally:
        os.umask(before)
    for file in (path, tmp_path / "held" / ".lock"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*x\.json"):
        read_json(tmp_path / "x.json")
    for content in (b'{"a": ', b"", b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json is not readable JSON"):
            read_json(tmp_path / "x.json")


def test_the_environment_says_what_a_number_depends_on_and_nothing_of_its_owner() -> None:
    found = environment()
    assert found["python"] == sys.version.split()[0] and found["cores"] == os.cpu_count()
    assert found["packages"]["torch"].split(".")[0].isdecimal() and set(found["packages"]) >= {"attnlab", "numpy"}
    assert found["cpu"] and found["cpu"] == found["cpu"].strip() and ":" not in found["cpu"]
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"^model name[ \t]*:[ \t]*(.*?)[ \t]*$", listed, re.MULTILINE)
    assert found["cpu"] == (models[0] if models else platform.processor() or "unknown")
    root = Path(sys.modules["attnlab"].__file__ or "").parents[2]
    git = shutil.which("git") if (root / ".git").exists() else None
    words = [git or "", "-C", str(root), "log", "-1", "--format=%H"]
    done = subprocess.run(words, capture_output=True, text=True) if git else None
    assert found["revision"] == (done.stdout[:12] if done and not done.returncode else None)
    assert os.sep not in found["platform"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")
def test_one_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with alone(folder, "trains in"):
        with (
            pytest.raises(UserError, match=r"another process trains in .*b: wait until it has ended"),
            alone(folder, "trains in", patience=0.0),
        ):
            pytest.fail("it was let in")
        with alone(tmp_path, "trains in", patience=0.0):
            pass  # another folder
    with alone(folder, "trains in", patience=0.0):
        assert (folder / ".lock").exists()
    with pytest.raises(ZeroDivisionError), alone(folder, "trains in", patience=0.0):
        raise ZeroDivisionError
    with alone(folder, "trains in", patience=0.0):
        pass


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")
def test_whoever_is_patient_gets_the_folder_in_the_end(tmp_path: Path) -> None:
    held, entered, order = threading.Event(), threading.Event(), []

    def hold() -> None:
        with alone(tmp_path, "works in"):
            held.set()
            entered.wait(0.3)  # nobody sets it while this is held
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with alone(tmp_path, "works in", patience=60.0):
        order.append("second")
        entered.set()
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks of this kind")
def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path, "works in", patience=0.0):
        assert "cannot be locked (No locks available): let no second process in" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("to be or not to be " * 40)
    words = ["prepare", f"text:{tmp_path / 'text.txt'}", "--tokenizer", "char", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "out.unfinished cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, (1, 0, False, False)),
        ({"WORLD_SIZE": "4"}, (1, 0, False, False)),  # of something else: no rank is told
        ({"RANK": "3"}, (1, 0, False, False)),  # `check_launcher` refuses it
        ({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "0"}, (4, 3, False, False)),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, (2, 0, True, False)),
        ({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}, (1, 0, True, True)),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, (1, 0, False, False)),
    ],
)
def test_what_a_launcher_says(said: dict[str, str], found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert (launched(), rank(), restarted(), lasting_store()) == found


def test_what_each_strategy_shards(tmp_path: Path) -> None:
    everything = ["optimizer", "gradients", "weights"]
    plain = find_sharding("ddp")
    assert plain is strategies.strategy("ddp").sharding and not plain.sharded and str(plain) == "ddp"
    assert find_sharding("fsdp").sharded == set(everything) and str(find_sharding("fsdp")) == "fsdp"
    assert [(each.by_rows, each.buckets) for each in map(find_sharding, ("ddp", "fsdp", "deepspeed"))] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert str(find_sharding("deepspeed")) == "deepspeed, ZeRO stage 1"
    for stage in (1, 2, 3):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        found = find_sharding(f"deepspeed:{tmp_path}/zero.json")
        assert found.sharded == set(everything[:stage]) and str(found) == f"deepspeed, ZeRO stage {stage}"
    for text, words in (("ddpp", "did you mean 'ddp'"), ("fsdp:x.json", "deepspeed alone reads: give fsdp")):
        with pytest.raises(UserError, match=words):
            find_sharding(text)
