"""Ctrl-C ends every command soon, with one line: while it is imported, in native code, and where it is swallowed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnlab.cli import COMMANDS
from attnlab.cli import main as cli
from attnlab.errors import UserError
from attnlab.runs import signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no signals of this kind")

PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
{before}
sys.argv = ["attnlab", *sys.argv[1:]]
from attnlab.__main__ import program
program()
"""
AT_IMPORT = """
def hook(event, args):
    if event == "import" and args[0] == "{module}":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
"""
SWALLOWED = """
from attnlab.cli import COMMANDS
def deaf():
    while True:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
COMMANDS["list"] = deaf
"""
WRITING = """
from attnlab.cli import COMMANDS
from attnlab.files import whole_folder
from pathlib import Path
def deaf():
    with whole_folder(Path("out")) as half:
        (half / "x").write_text("1")
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(60)
COMMANDS["list"] = deaf
"""
WRONG_ERROR = """
from attnlab.cli import COMMANDS
def fails():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise SystemError("initialization of _native raised unreported exception")
COMMANDS["list"] = fails
"""


def run(before: str, *words: str, here: Path, **how: object) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before), *words],
        capture_output=True,
        text=True,
        cwd=here,
        timeout=100,
        **how,
    )  # type: ignore[call-overload]
    assert time.monotonic() - began < 50, "it did not wait for what is deaf"
    return done


@pytest.mark.parametrize("module", ["tyro", "attnlab.cli.options", "torch", "safetensors.torch"])
def test_while_a_module_is_imported(module: str, tmp_path: Path) -> None:
    words = ["prepare", "--help"] if module in ("tyro", "attnlab.cli.options") else ["sample", "nowhere"]
    done = run(AT_IMPORT.format(module=module), *words, here=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nattnlab: stopped\n")


@pytest.mark.parametrize("before", [SWALLOWED, WRONG_ERROR, WRITING], ids=["swallowed", "another error", "writing"])
def test_whatever_became_of_it(before: str, tmp_path: Path) -> None:
    done = run(before, "list", here=tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nattnlab: stopped\n")
    assert not list(tmp_path.iterdir()), "what was half-written is removed"


def test_a_program_that_began_with_ctrl_c_ignored_ignores_it(tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGINT)\n"
    before = f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{kill}" + AT_IMPORT.format(module="tyro")
    done = run(before, "--version", here=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("attnlab ") and not done.stderr


def test_it_is_said_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, said in (("", "stopped"), ("stopped; go on\nso", r"stopped; go on\nso")):

        def interrupted(words: str = words) -> int:
            raise KeyboardInterrupt(*([words] if words else []))

        monkeypatch.setitem(COMMANDS, "list", interrupted)
        assert cli.main(["list"]) == 130
        assert capsys.readouterr().err == f"\nattnlab: {said}\n"


def test_an_error_after_ctrl_c_is_the_end_and_not_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (ImportError("numpy failed"), UserError("torch is not installed"), OSError("x")):

        def fails(error: Exception = error) -> int:
            raise error

        monkeypatch.setitem(COMMANDS, "list", fails)
        monkeypatch.setattr(signals.Program, "asked", True)
        assert cli.main(["list"]) == 130
        assert capsys.readouterr().err == "\nattnlab: stopped\n"
        monkeypatch.setattr(signals.Program, "asked", False)
        assert cli.main(["list"]) == (1 if isinstance(error, ImportError) else 2)
        capsys.readouterr()


def test_a_name_with_line_breaks_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(tmp_path / "a\nb\x1b[2J")
    for words in (["sample", name], ["report", name], ["infer", name], ["tokenizer", "show", name]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and r"a\nb\x1b[2J" in said.replace("\\\\", "\\"), said


def test_a_name_that_is_too_long_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
    out = str(tmp_path / ("n" * 300))
    for words in (["prepare", f"text:{tmp_path / 'text.txt'}", "--tokenizer", "byte"], ["train", "quick"], ["compare"]):
        assert cli.main([*words, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and ("too long" in said) and "--debug" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
