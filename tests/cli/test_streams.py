"""Streams that cannot be written: progress is dropped, work goes on, and the exit code is that of the work."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab.cli import LASTING
from attnlab.cli import main as cli
from attnlab.cli.streams import Patient

TINY = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 12 --train.steps 3 --train.batch-size 2 "
    "--train.eval-every 1 --train.eval-batches 1 --train.save-every 3 --train.precision fp32 --train.device cpu"
)
ATTNLAB = f"{sys.executable} -m attnlab"


def shell(line: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], cwd=where, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


@pytest.mark.parametrize("streams", ["2>&1 | head -1", "<&- >&- 2>/dev/full"])
def test_training_goes_on_without_readers(streams: str, tmp_path: Path) -> None:
    done = shell(f"{ATTNLAB} train quick {TINY} --out run {streams}; echo ${{PIPESTATUS[0]}} > code", tmp_path)
    assert (tmp_path / "code").read_text() == "0\n", done
    assert (tmp_path / "run/result.json").exists() and (tmp_path / "run/step-00000003/commit.json").exists()
    assert "Traceback" not in done.stderr


def test_help_that_cannot_be_printed_is_one_sentence(tmp_path: Path) -> None:
    full = shell(f"{ATTNLAB} status --help > /dev/full", tmp_path)
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "the disk is full" in full.stderr
    assert shell(f"{ATTNLAB} status --nope >&- 2>&-", tmp_path).returncode == 2


class Broken(io.StringIO):
    """A pipe whose reader has ended after some characters."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        self.room -= len(text)
        if self.room < 0:
            raise BrokenPipeError
        return super().write(text)


def test_printed_results_end_with_141(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(100))
    assert cli.main(["--help"]) == 141
    assert "train" in LASTING and "list" not in LASTING and "sample" not in LASTING
    monkeypatch.setattr(cli, "run_command", lambda given: print("x" * 200) or 1)
    monkeypatch.setattr(sys, "stdout", Broken(100))
    assert cli.main(["train", "quick"]) == 1, "what became of the work"


def test_a_stream_that_broke_drops_the_rest() -> None:
    stream = Patient(Broken(5))
    assert [stream.write("abcd"), stream.write("efg"), stream.write("h")] == [4, 3, 1]
    stream.flush()
    assert stream.broken and stream.stream.getvalue() == "abcd"  # type: ignore[attr-defined]
    closed = io.StringIO()
    closed.close()
    assert Patient(closed).write("x") == 1


@pytest.mark.parametrize("columns", ["0", "1", "-3", "wide", ""])
def test_a_width_that_means_nothing_is_not_believed(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(["status", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) > 60 and "--after" in out
    assert os.environ["COLUMNS"] == columns, "it is as it was"


def test_letters_that_an_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stderr", narrow)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    assert cli.main(["train", "quick", "--train.steps", "é\n"]) == 2
    narrow.flush()
    said = narrow.buffer.getvalue()  # type: ignore[attr-defined]
    assert said.count(b"\n") == 1 and b"\\xe9" in said


def test_errors_of_libraries_are_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, words in (
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 640 bytes."), 2, "640 bytes"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), 2, "20.00 GiB"),
        (RecursionError("maximum recursion depth"), 2, "too deeply"),
        (PermissionError(13, "Permission denied", "/somewhere"), 2, "'/somewhere'"),
        (OSError(5, "Input/output error"), 2, "input/output error"),
        (KeyError("lost"), 1, "KeyError: lost"),
        (SystemExit(0), 1, "exit code 0"),
    ):

        def fail(given: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setattr(cli, "run_command", fail)
        assert cli.main(["list"]) == code
        said = capsys.readouterr().err
        assert words.lower() in said.lower() and said.count("\n") == 1 and said.startswith("attnlab: "), said
