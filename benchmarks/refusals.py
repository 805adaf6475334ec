"""Calls that cannot work, in places where nobody would try them. Anyone can run it, on two cores in a quarter hour:

    python benchmarks/refusals.py                  all of them, and what is wrong
    python benchmarks/refusals.py --only plugin    those whose kind or name has this in it
    python benchmarks/refusals.py --sample 20      20 % of them, always the same

A call is refused well when it ends with exit code 2 and one sentence on stderr, and leaves nothing behind. One that may
work (`sound`) must end in that way or do its work. One that nobody can hear (`mute`) may do its work and end with 2. No
call may show a traceback, hang, or print the parser's box. The cases are in refusal_cases.py. Linux only: a call is a
forked child.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "200")

SMALL = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 --train.steps 4 --train.batch-size 2 "
    "--train.eval-every 2 --train.eval-batches 1 --train.save-every 2 --train.precision fp32 --train.device cpu"
).split()
NOBODY = 65534  # the user that owns nothing
Expected = Literal["refused", "sound", "done", "not green", "mute"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, what is done before it, and how it may end."""

    kind: str
    name: str
    words: Sequence[str] | Callable[[], object]  # of the command line, or a function of Python
    needs: tuple[str, ...] = ()  # folders of the base that are copied to where it runs
    before: Callable[[], object] | None = None  # in that folder
    expected: Expected = "refused"
    inside: Callable[[], object] | None = None  # in the child, before the call: limits, streams, another user
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)  # None: it is taken out
    twice: bool = False  # two such processes at once
    signal: tuple[int, float] | None = None  # and the seconds after which it comes
    after: Callable[[], str] | None = None  # what is wrong with what is there now; "" for nothing
    patience: float = 90.0  # seconds
    fresh: bool = False  # in a new interpreter, for what is read as Python starts


class Ended(NamedTuple):
    """The end of a process."""

    code: int  # negative: of this signal; -99: it was killed as it did not end
    out: str
    err: str


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its kind, and the size and time of files."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(place, name))
            plain = stat.S_ISREG(state.st_mode)
            facts = (stat.S_IFMT(state.st_mode), state.st_size if plain else 0, state.st_mtime_ns if plain else 0)
            found[os.path.relpath(os.path.join(place, name), folder)] = facts
    return found


def call(words: Sequence[str] | Callable[[], object], fresh: bool) -> int:
    """Make the call of a case in this process. Returns its exit code."""
    if callable(words):
        try:
            words()
        except (TypeError, ValueError) as error:
            if "\n" in str(error) or not str(error) or deep(error):
                raise
            print(f"attnlab: {error}", file=sys.stderr)
            return 2
        return 0
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "attnlab", *words])
    from attnlab.cli.main import run

    sys.argv = ["attnlab", *words]
    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def deep(error: Exception) -> bool:
    """Whether an error comes from inside a function, and not from the check of its arguments."""
    from attnlab import UserError

    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [code for code in frames if f"{os.sep}attnlab{os.sep}" in code.co_filename]
    return not isinstance(error, UserError) and bool(ours) and ours[-1].co_name not in ("call", "__init__")


def child(case: Case, folder: Path, log: Path) -> int:
    """Begin the call in a process of its own group. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, f"{log}.out", 577), (2, f"{log}.err", 577)):
            handle = os.open(path, flags, 0o666)
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        for name, value in case.environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.path[:0] = [each for each in os.environ.get("PYTHONPATH", "").split(":") if each not in sys.path]
        if case.inside:
            case.inside()
        code = call(case.words, case.fresh)
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code & 255)


def awaited(pids: Sequence[int], case: Case, log: Path) -> list[Ended]:
    """Wait for the processes of a case, and signal the first where the case says so."""
    begun = time.monotonic()
    codes: dict[int, int] = {}
    waiting = case.signal
    while len(codes) < len(pids):
        time.sleep(0.01)
        passed = time.monotonic() - begun
        if waiting and passed > waiting[1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], waiting[0])
            waiting = None
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif passed > case.patience:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = -99
    ended = []
    for number, pid in enumerate(pids):
        texts = [Path(f"{log}{number}.{end}").read_text("utf-8", "replace") for end in ("out", "err")]
        ended.append(Ended(codes[pid], *texts))
    return ended


def refused(end: Ended) -> Iterator[str]:
    """What is wrong with the words of a refusal."""
    lines = [line for line in end.err.splitlines() if line.strip() and "%|" not in line]  # a library's progress
    said = [line for line in lines if line.startswith("attnlab")]
    if len(said) != 1:
        yield f"{len(said)} sentences"
    elif len(lines) > 1:
        yield "more than its sentence"
    if any("--debug shows where" in line for line in said):
        yield "the system's words"


def wrong(case: Case, ends: Sequence[Ended], changed: list[str], green: bool) -> Iterator[str]:
    """What is wrong with how a case ended."""
    for end in ends:
        if end.code == -99:
            yield f"hangs, over {case.patience:g} s"
        if "Traceback (most recent call last)" in end.err:
            yield "a traceback"
        if "╭" in end.err:
            yield "a box"
        if end.code == 2 and case.signal is None and not case.twice and case.expected != "mute":
            yield from refused(end)
        if (end.code in (1, 99) and case.expected != "not green") or (-99 < end.code < 0 and not case.signal):
            yield f"exit code {end.code}"
    codes = [end.code for end in ends]
    if case.expected == "refused" and codes[0] != 2:
        yield f"exit code {codes[0]}, not 2"
    if case.expected == "done" and 0 not in codes:
        yield f"exit code {codes[0]}, not 0"
    if case.expected == "not green" and 0 in codes:
        yield "a green light"
    if changed and (case.expected == "refused" or (set(codes) == {2} and case.expected != "mute")):
        yield f"left {', '.join(changed[:3])}"
    if case.after and green and (found := case.after()):
        yield found


def tried(case: Case, base: Path, home: Path, number: int) -> list[str]:
    """Make a case, and return what is wrong, each once."""
    folder = home / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folder.chmod(0o777)
    log = home / f"log-{number:04d}-"
    for name in case.needs:
        copy = shutil.copytree if (base / name).is_dir() else shutil.copy
        copy(base / name, folder / name)
    here = os.getcwd()
    os.chdir(folder)
    try:
        if case.before:
            case.before()
        before = tree(folder)
        pids = [child(case, folder, Path(f"{log}{each}")) for each in range(1 + case.twice)]
        ends = awaited(pids, case, log)
        after = tree(folder)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return list(dict.fromkeys(wrong(case, ends, changed, True)))
    finally:
        os.chdir(here)


def make_base(base: Path) -> None:
    """Train, export, prepare and compare what the cases start from."""
    from attnlab.cli.main import main as attnlab

    text = "a cat sat on the mat and said hello to every mouse\n\n" * 200
    (base / "text.txt").write_text(text)
    commands = (
        ["train", "quick", *SMALL, "--out", "run"],
        ["train", "quick", *SMALL, "--model.norm", "rms", "--model.ff", "swiglu", "--out", "rms"],
        ["export", "run", "--out", "exported"],
        ["export", "rms", "--family", "llama", "--out", "llama"],
        ["prepare", "text:text.txt", "--tokenizer", "byte", "--documents", "blank", "--out", "corpus"],
        ["convert", "run", "--to", "mla", "--calibrate", "1", "--out", "converted"],
        ["tokenizer", "train", "text:text.txt", "--vocab-size", "300", "--out", "bpe.json"],
        ["compare", "quick", "--mechanisms", "mha,mla", "--seeds", "2", "--jobs", "1", *SMALL, "--out", "compared"],
    )
    here = os.getcwd()
    os.chdir(base)
    for words in commands:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            code = attnlab(words)
        assert code == 0, words
    os.chdir(here)


def limit(what: int, most: int) -> Callable[[], None]:
    """What limits a resource of the child."""
    return functools.partial(resource.setrlimit, what, (most, most))


def main() -> int:
    """Try the cases, print what is wrong and a count by kind. Returns 1 where anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the kind or the name")
    parser.add_argument("--sample", type=int, default=100, help="percent of the cases")
    given = parser.parse_args()
    from refusal_cases import CASES

    chosen = [
        (number, case)
        for number, case in enumerate(CASES)
        if given.only in f"{case.kind}: {case.name}"
        and zlib.crc32(case.name.encode("utf-8", "replace")) % 100 < given.sample
    ]
    import torch

    import attnlab.audit
    import attnlab.cli.main
    import attnlab.comparison.compare
    import attnlab.convert
    import attnlab.heads
    import attnlab.hf.folder
    import attnlab.inference.text
    import attnlab.report
    import attnlab.training.train  # noqa: F401

    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    bad: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="refusals-") as made:
        home = Path(made)
        home.chmod(0o755)
        (home / "base").mkdir()
        pid = os.fork()  # the parent stays without threads and without state of its own
        if not pid:
            if any(case.needs for _, case in chosen):
                make_base(home / "base")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the base could not be made"
        for number, case in chosen:
            counts[case.kind] += 1
            try:
                found = tried(case, home / "base", home, number)
            except Exception as error:
                found = [f"could not be tried: {error!r}"]
            if found:
                bad[case.kind] += 1
                said = (
                    (home / f"log-{number:04d}-0.err").read_text("utf-8", "replace").strip()
                    if list(home.glob(f"log-{number:04d}-0.err"))
                    else ""
                )
                print(
                    f"{case.kind}: {case.name}: {'; '.join(found)} | {said[-160:]!r}".encode(
                        "utf-8", "backslashreplace"
                    ).decode(),
                    flush=True,
                )
            shutil.rmtree(home / f"{number:04d}", ignore_errors=True)
    print("\n| kind | calls | with problems |\n| --- | --- | --- |")
    for kind in counts:
        print(f"| {kind} | {counts[kind]} | {bad[kind]} |")
    print(f"| all | {counts.total()} | {bad.total()} |")
    return int(bad.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
