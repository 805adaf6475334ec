"""Faults, tried on real runs, and what is left of the runs. Anyone can run it, on two cores in a few minutes:

    python benchmarks/faults.py                 a table of all of them, in Markdown
    python benchmarks/faults.py --only kill     those with a word in their name

A run has survived a fault when its newest checkpoint is there and its checksums are right, its metrics are readable,
and the same command with --resume ends with the same bits as a run that nothing happened to: weights, optimizer,
losses, and which checkpoints are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from speed import markdown, provenance, say

from attnlab.results import RunResult
from attnlab.runs.folder import RunFolder

WORKER = Path(__file__).with_name("fault_worker.py")
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n" * 20
SHAPE: dict[str, Any] = {
    "peak": 1e9,  # measuring it would take longer than the run
    "model.context": 16,
    "model.n-layers": 1,
    "model.d-model": 16,
    "model.n-heads": 2,
    "model.dropout": 0.1,
    "train.steps": 12,
    "train.batch-size": 4,
    "train.warmup": 2,
    "train.log-every": 1,
    "train.eval-every": 4,
    "train.eval-batches": 3,
    "train.save-every": 4,
    "train.precision": "fp32",
    "train.device": "cpu",
}
COMPILED = {"train.compile": True, "train.steps": 2, "train.keep": 1}
SHARDED = {"strategy": "fsdp", "model.dropout": 0.0}
WORSE = {"train.lr": 10, "train.warmup": 11, "train.keep": 1}  # the first validation is the best
Options = Mapping[str, Any] | None
PROMPT = 60.0  # seconds in which all processes must have ended, once one of them has


class Done(NamedTuple):
    """What became of a command."""

    codes: list[int]  # of its processes by rank, or of the launcher; negative: the signal that ended it
    said: str
    seconds: float  # from the fault, or from the start where there was none, to the end of the last process


class Outcome(NamedTuple):
    words: str  # what happened
    seconds: float  # from the fault until all processes had ended


class NotPossible(Exception):
    """A fault that cannot be tried here."""


@dataclass
class Lab:
    """Runs commands in a folder of its own."""

    home: Path
    fast: bool = True  # processes are forked from a server, rather than started
    wholes: dict[str, Path] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        (self.home / "text.txt").write_text(TEXT)
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{self.home}/compiled"}
        self.server = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env
        )

    def close(self) -> None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()

    def new(self, name: str = "run") -> Path:
        self.count += 1
        return self.home / f"{name}-{self.count}"

    def words(self, out: Path, options: Mapping[str, Any], resume: bool) -> list[str]:
        given = SHAPE | {"data": f"text:{self.home}/text.txt", "out": out} | dict(options)
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        return ["train", "quick", *flags, *(["--resume"] if resume else [])]

    def run(
        self,
        out: Path,
        fault: Options = None,
        options: Options = None,
        *,
        resume: bool = False,
        processes: int = 1,
        fast: bool | None = None,
        launcher: tuple[str, ...] = (),
        timeout: float = 180,
    ) -> Done:
        """`attnlab train`, with a fault."""
        words = self.words(out, options or {}, resume)
        quick = self.fast if fast is None else fast
        return self.command(words, out, fault, processes, quick, launcher, timeout)

    def command(
        self,
        words: list[str],
        out: Path,
        fault: Options = None,
        processes: int = 1,
        fast: bool = True,
        launcher: tuple[str, ...] = (),
        timeout: float = 180,
    ) -> Done:
        """A command of attnlab, with a fault; `out` is the folder whose writes are counted."""
        self.count += 1
        mark, log = self.home / f"mark-{self.count}", self.home / f"log-{self.count}"
        fault = dict(fault or {}) | {"mark": str(mark), "out": str(out)}
        began = time.time()
        if fast:
            assert self.server.stdin and self.server.stdout
            job = {"words": words, "fault": fault, "processes": processes, "log": str(log), "timeout": timeout}
            print(json.dumps(job), file=self.server.stdin, flush=True)
            answer = json.loads(self.server.stdout.readline())
            codes, hung, ended = answer["codes"], answer["hung"], answer["ended"]
        else:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher]
            command = [sys.executable, *(start if processes > 1 else []), str(WORKER), json.dumps(fault), *words]
            with open(log, "w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, env=self.env, start_new_session=True)
                try:
                    hung, codes = False, [process.wait(timeout)]
                except subprocess.TimeoutExpired:
                    process.terminate()  # a launcher then ends its workers
                    hung, codes = True, [process.wait(PROMPT)]
            ended = time.time()
        said = log.read_text() if log.exists() else ""
        assert not hung, f"not all processes ended within {timeout:.0f} s:\n{said[-3000:]}"
        return Done(codes, said, ended - (float(mark.read_text()) if mark.exists() else began))

    def whole(self, options: Options = None, fault: Options = None, processes: int = 1) -> Path:
        """The folder of a run with these options, and this poison, to which nothing else happened."""
        key = json.dumps([options, fault, processes])
        if key not in self.wholes:
            out = self.new("whole")
            done = self.run(out, fault, options, processes=processes, fast=True)
            assert set(done.codes) == {0}, done.said[-3000:]
            self.wholes[key] = out
        return self.wholes[key]


# what is checked


def newest(out: Path) -> int | None:
    """The step of the newest checkpoint, which must be as it was written, like everything else."""
    if not (out / "run.json").exists():
        return None
    folder = RunFolder.open(out)
    folder.metrics(), folder.result()
    step = folder.newest()
    if step is not None:
        folder.load(step)
    return step


def same(out: Path, whole: Path) -> None:
    """AssertionError unless two folders hold the same finished run, bit for bit."""
    (one, a), (other, b) = ((folder, folder.load()) for folder in map(RunFolder.open, (out, whole)))
    for found, expected in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), "other weights"
    assert lasting(a.state) == lasting(b.state)
    assert one.steps() == other.steps(), f"the checkpoints kept are {one.steps()} rather than {other.steps()}"
    assert one.best() == other.best(), "another is the best"
    first, second = one.result(), other.result()
    assert first and second and told(first) == told(second)
    assert curves(one) == curves(other)


def lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "seconds"}


def told(result: RunResult) -> list[Any]:
    return [
        result.status,
        result.steps,
        result.tokens,
        result.curve,
        result.train_curve,
        result.skipped,
        result.rewinds,
    ]


def curves(folder: RunFolder) -> list[list[Any]]:
    """The losses on record, in their order."""
    keys = ("step", "loss", "val_loss", "grad_norm", "skipped")
    return [[r.get(key) for key in keys] for r in folder.metrics() if "rewound_from" not in r]


def resumed(
    lab: Lab,
    out: Path,
    whole: Path,
    options: Options = None,
    fault: Options = None,
    processes: int = 1,
) -> None:
    done = lab.run(out, fault, options, resume=True, processes=processes, fast=True)
    assert set(done.codes) == {0}, done.said[-3000:]
    same(out, whole)


# a: killed at every write


WALK = {"train.steps": 4, "train.save-every": 2, "train.eval-every": 3, "train.keep": 1, "model.d-model": 8}


def walk(
    lab: Lab,
    at: str,
    options: Mapping[str, Any],
    *,
    begun: Path | None = None,
    points: Iterator[int] | range = range(1, 1000),
    rank: int = 0,
    processes: int = 1,
    fault: Options = None,
) -> tuple[int, float]:
    """Kill at each point until one is not reached: how many were, and the longest it took until all had ended."""
    whole, tried, longest = lab.whole(options, fault, processes), 0, 0.0
    for number in points:
        out = lab.new("walk")
        before = None
        if begun:
            shutil.copytree(begun, out)
            before = newest(out)
        armed = dict(fault or {}) | {"at": at, "number": number, "do": "SIGKILL", "rank": rank}
        done = lab.run(out, armed, options, resume=begun is not None, processes=processes, fast=True, timeout=PROMPT)
        if not any(done.codes):
            assert tried, "no point was reached"
            break
        assert done.codes[rank] == -signal.SIGKILL, done
        found = newest(out)
        if processes > 1 and found != options["train.steps"]:  # there was something left to do together
            others = [code for other, code in enumerate(done.codes) if other != rank]
            assert min(others) > 0 and "another process of this run is gone" in done.said, done
        assert before is None or (found is not None and found >= before), f"point {number}: {found} after {before}"
        try:
            resumed(lab, out, whole, options, fault, processes)
        except AssertionError as error:
            raise AssertionError(f"killed at {at} {number} of rank {rank}, whose newest is {found}: {error}") from error
        tried, longest = tried + 1, max(longest, done.seconds)
        shutil.rmtree(out)
    return tried, longest


def killed_at_every_write(lab: Lab) -> Outcome:
    tried, seconds = walk(lab, "write", WALK)
    return Outcome(f"at each of {tried} writes, from the run's first to its last", seconds)


def killed_within_every_file(lab: Lab) -> Outcome:
    files, seconds = walk(lab, "half", WALK)
    lines, later = walk(lab, "half line", WALK)
    return Outcome(f"in the middle of each of {files} files and {lines} records", max(seconds, later))


def killed_while_it_resumes(lab: Lab) -> Outcome:
    """Begun with the remains of a save that was killed, and an old checkpoint half dropped."""
    begun = lab.new("begun")
    lab.run(begun, {"at": "half", "number": 7, "do": "SIGKILL"}, WALK, fast=True)
    assert list(begun.glob(".step-*")) and newest(begun) == 2
    gone = begun / "step-00000001"
    shutil.copytree(begun / "step-00000002", gone)
    (gone / "commit.json").unlink()
    (begun / ".metrics.jsonl.cut").write_text('{"st')
    tried, seconds = walk(lab, "write", WALK, begun=begun, points=range(1, 17))
    return Outcome(f"at each of its first {tried} writes", seconds)


TWO = WALK | SHARDED | {"train.steps": 2}


def killed_one_of_two(lab: Lab, step: int = 4) -> Outcome:
    """One process of two that write shards, at some of its writes: the other must not wait for it."""
    tried, longest = 0, 0.0
    for rank, points in ((0, range(11, 31, step)), (1, range(1, 6, max(1, step // 2)))):
        more, seconds = walk(lab, "write", TWO, points=points, rank=rank, processes=2)
        tried, longest = tried + more, max(longest, seconds)
    return Outcome(f"at {tried} writes of either, sharded; the other said that it is alone, exit code 2", longest)


# b: asked to stop


def stopped(
    lab: Lab, at: str, number: int, step: int, do: str, options: Options = None, processes: int = 1, **more: Any
) -> Outcome:
    """It ends well at `step`."""
    whole, out = lab.whole(options, processes=processes), lab.new()
    fault = {"at": at, "number": number, "do": do, **more}
    done = lab.run(out, fault, options, processes=processes, fast=True if processes > 1 else None)
    assert set(done.codes) == {0}, done.said[-3000:]
    assert done.said.count("the run is saved in") == done.said.count("the same command with --resume goes on") == 1
    result = RunFolder.open(out).result()
    assert newest(out) == step and result and result.status == "interrupted" and result.steps == step, newest(out)
    if at == "evaluation":
        assert not result.curve, "what was cut short does not count"
    resumed(lab, out, whole, options, processes=processes)
    return Outcome(f"exit code 0, with a checkpoint of step {step}", done.seconds)


# c: a worker dies


def launched(lab: Lab, fault: Mapping[str, Any], *launcher: str) -> tuple[Path, Done]:
    """Two workers of torchrun, and a fault in the second."""
    out = lab.new()
    done = lab.run(out, {"at": "step", "number": 7, "rank": 1, **fault}, processes=2, fast=False, launcher=launcher)
    return out, done


def worker_killed(lab: Lab) -> Outcome:
    out, done = launched(lab, {"do": "SIGKILL"})
    assert done.seconds < PROMPT and done.codes[0] > 0 and "Signal 9 (SIGKILL)" in done.said, done.said[-3000:]
    assert "process 0 of 2: another process of this run is gone" in done.said, done.said[-3000:]
    assert newest(out) == 4
    resumed(lab, out, lab.whole(processes=2), processes=2)
    return Outcome("both ended, exit code not 0; the survivor and torchrun say why", done.seconds)


def worker_restarted(lab: Lab) -> Outcome:
    out, done = launched(lab, {"do": "SIGKILL"}, "--max-restarts=1")
    assert done.codes == [0], done.said[-3000:]
    same(out, lab.whole(processes=2))
    return Outcome("went on from the checkpoint of step 4 to the same end", done.seconds)


def worker_raises(lab: Lab) -> Outcome:
    out, done = launched(lab, {"do": "raise"})
    assert done.seconds < PROMPT and done.codes[0] > 0 and "RuntimeError: the roof fell in" in done.said, done.said[
        -3000:
    ]
    assert newest(out) == 4
    resumed(lab, out, lab.whole(processes=2), processes=2)
    return Outcome("both ended, exit code not 0, with the traceback of the one that failed", done.seconds)


def launcher_stopped(lab: Lab) -> Outcome:
    out, done = launched(lab, {"do": "SIGTERM", "to": "parent"})
    step = newest(out)
    assert step is not None and 7 <= step < 12 and "--resume goes on from there" in done.said, done.said[-3000:]
    resumed(lab, out, lab.whole(processes=2), processes=2)
    return Outcome(f"both ended with a checkpoint; torchrun's own exit code is {done.codes[0]}", done.seconds)


# d: a full disk


def disk_full(lab: Lab, **fault: Any) -> Outcome:
    """As where a file may not become larger than so many bytes."""
    out = lab.new()
    done = lab.run(out, {"at": "step", "number": 7, "do": "limit", **fault})
    refused(done, out)
    resumed(lab, out, lab.whole())
    return Outcome("stopped in one sentence, exit code 2; with space again, it went on", done.seconds)


def refused(done: Done, out: Path) -> None:
    assert done.codes == [2], done.said[-3000:]
    assert "the disk is full; free space and run the same command again with --resume" in done.said, done.said
    assert "Traceback" not in done.said
    assert newest(out) == 4 and not list(out.glob(".step-*")), sorted(out.iterdir())


def small_disk_full(lab: Lab) -> Outcome:
    """A file system in memory, really full."""
    with small_disk(lab.home / "disk") as disk:
        out, ballast = disk / "run", disk / "ballast"
        done = lab.run(out, {"at": "step", "number": 7, "do": "full", "fill": str(ballast)})
        refused(done, out)
        ballast.unlink()
        resumed(lab, out, lab.whole())
    return Outcome("stopped in one sentence, exit code 2; with space again, it went on", done.seconds)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        raise NotPossible("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


# e: guards


def skips(lab: Lab, kind: str, more: Options = None) -> Outcome:
    """The step with the bad batch is not taken, and counted."""
    options = {"train.guard": "skip", "train.save-every": 1, "train.keep": 0, "train.steps": 16} | dict(more or {})
    step, out = 13, lab.new()
    done = lab.run(out, {"poison": {step - 1: kind}}, options)
    assert done.codes == [0], done.said[-3000:]
    folder = RunFolder.open(out)
    result = folder.result()
    assert result and result.status == "done" and (result.skipped, result.rewinds) == (1, 0)
    assert [r["step"] for r in folder.metrics() if "skipped" in r] == [step]
    before, after, later = (folder.load(at) for at in (step - 1, step, step + 1))
    assert all(torch.equal(after.model[name], value) for name, value in before.model.items()), "it was taken"
    assert all(torch.equal(after.optimizer[name], value) for name, value in before.optimizer.items()), "it was taken"
    assert not all(torch.equal(later.model[name], value) for name, value in after.model.items())
    return Outcome("that step was not taken, counted, and the run went on to its end", done.seconds)


def rewinds(lab: Lab, kind: str, more: Options = None) -> Outcome:
    """Back to the newest checkpoint, past the bad batch; the same each time, and if it is killed there."""
    options = {"train.guard": "rewind", "train.steps": 16, "model.d-model": 8} | dict(more or {})
    fault = {"poison": {13: kind}}  # in step 14, two after a checkpoint
    out = lab.new()
    done = lab.run(out, fault, options)
    assert done.codes == [0] and "back to step 12, and its batches are left out" in done.said, done.said[-3000:]
    folder = RunFolder.open(out)
    result = folder.result()
    assert result and (result.status, result.rewinds, result.skipped) == ("done", 1, 0)
    assert [r["rewound_from"] for r in folder.metrics() if "rewound_from" in r] == [14]
    assert folder.state()["shift"] == 2
    same(out, lab.whole(options, fault))
    return Outcome("back to step 12, counted; its two batches left out; two such runs are equal", done.seconds)


def killed_around_a_rewind(lab: Lab, step: int = 3) -> Outcome:
    options = {
        "train.guard": "rewind",
        "train.steps": 6,
        "train.save-every": 2,
        "model.d-model": 8,
        "train.eval-every": 6,
    }
    tried, seconds = walk(lab, "write", options, points=range(25, 70, step), fault={"poison": {2: "nan"}})
    return Outcome(f"at {tried} writes before and after it", seconds)


def gives_up(lab: Lab) -> Outcome:
    out = lab.new()
    places = {str(place): "nan" for place in range(5, 200)}
    done = lab.run(out, {"poison": places}, {"train.guard": "rewind"})
    assert done.codes == [2] and "at step 5 of 12 after 10 rewinds, and the checkpoint of step 4 is kept" in done.said
    result = RunFolder.open(out).result()
    assert newest(out) == 4 and result and (result.status, result.rewinds) == ("failed", 10)
    return Outcome(
        "stopped after 10 rewinds in one sentence, exit code 2; the checkpoint of step 4 is kept", done.seconds
    )


def stops(lab: Lab, kind: str, more: Options = None) -> Outcome:
    out = lab.new()
    done = lab.run(out, {"poison": {13: kind}}, {"train.steps": 16} | dict(more or {}))
    assert done.codes == [2] and "at step 14 of 16, and the checkpoint of step 12 is kept" in done.said, done.said
    result = RunFolder.open(out).result()
    assert newest(out) == 12 and result and result.status == "failed"
    return Outcome("stopped in one sentence, exit code 2; the checkpoint of step 12 is kept", done.seconds)


def decided_alike(lab: Lab, guard: str) -> Outcome:
    """One of two processes meets a bad batch: both do what one process would."""
    options = {"train.guard": guard, "train.steps": 16, "model.dropout": 0.0}
    fault = {"poison": {13: "nan"}, "ranks": [1]}
    out = lab.new()
    done = lab.run(out, fault, options, processes=2, fast=True)
    assert done.codes == [0, 0], done.said[-3000:]
    one, two = (RunFolder.open(path) for path in (lab.whole(options, fault | {"ranks": [0]}), out))
    a, b = one.result(), two.result()
    assert a and b and (a.skipped, a.rewinds) == (b.skipped, b.rewinds) == ((1, 0) if guard == "skip" else (0, 1))
    for first, second in zip(a.train_curve, b.train_curve, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    return Outcome("both did, and the losses are those of one process", done.seconds)


def overflows(lab: Lab) -> Outcome:
    """float16: the scale is halved, and is part of the checkpoint."""
    options = {"train.precision": "fp16"}
    fault = {"poison": {2: "overflow", 5: "overflow"}}
    whole, out = lab.whole(options, fault), lab.new()
    result = RunFolder.open(whole).result()
    assert RunFolder.open(whole).state()["scale"] == [2.0**14, 6] and result and result.skipped == 0
    done = lab.run(out, fault | {"at": "step", "number": 7, "do": "SIGTERM"}, options)
    assert newest(out) == 7 and RunFolder.open(out).state()["scale"] == [2.0**14, 1]
    resumed(lab, out, whole, options, fault)
    return Outcome("the scale was halved each time; stopped and resumed, it ended the same", done.seconds)


# f: two processes, folders that are written, imports


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file was last written, and its size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def second_process(lab: Lab) -> Outcome:
    """One process stands still in step 7, so that the others come while it holds the folder."""
    whole, out = lab.whole(), lab.new()
    fault = {"at": "step", "number": 7, "do": "SIGSTOP", "mark": str(lab.home / "standing"), "out": str(out)}
    with open(lab.home / "log-standing", "w") as log:
        command = [sys.executable, str(WORKER), json.dumps(fault), *lab.words(out, {}, False)]
        first = subprocess.Popen(command, stdout=log, stderr=log, env=lab.env)
    try:
        until = time.monotonic() + PROMPT
        while not (lab.home / "standing").exists():
            assert first.poll() is None and time.monotonic() < until, (lab.home / "log-standing").read_text()
            time.sleep(0.05)
        before, began = written(out), time.time()
        for options, resume in (({}, True), ({"model.d-model": 8}, False)):
            done = lab.run(out, None, options, resume=resume, fast=True)
            assert done.codes == [2] and f"another process trains in {out}: wait until" in done.said, done
        seconds = time.time() - began
        assert before == written(out), "they changed something"
    finally:
        first.send_signal(signal.SIGCONT)
        code = first.wait(PROMPT)
    assert code == 0, (lab.home / "log-standing").read_text()
    same(out, whole)
    return Outcome("two others were refused in a sentence, and changed nothing; the first ended the same", seconds)


SOURCE = {"train.steps": 1, "train.eval-every": 1, "model.d-model": 8, "train.eval-batches": 1}


def killed_while_it_writes_a_folder(lab: Lab, words: tuple[str, ...], contents: set[str], step: int = 3) -> Outcome:
    """Killed at some of its writes: its folder is then whole or not there, and the same command makes it."""
    run, tried, longest = lab.whole(SOURCE), 0, 0.0
    text = (
        ("--data", f"text:{lab.home}/text.txt", "--calibrate", "1", "--context", "8") if words[0] == "convert" else ()
    )
    for number in range(1, 1000, step):
        home = lab.new("folders")
        home.mkdir()
        command = [words[0], str(run), *words[1:], *text, "--out", str(home / "made")]
        done = lab.command(command, home, {"at": "write", "number": number, "do": "SIGKILL"}, timeout=PROMPT)
        if done.codes == [0]:
            assert tried, "no point was reached"
            break
        assert done.codes == [-signal.SIGKILL], done
        made = (home / "made").exists()
        assert not made or contents <= {path.name for path in (home / "made").iterdir()}, "it is there, and not whole"
        again = lab.command(command, home, timeout=PROMPT)
        assert again.codes == [2 if made else 0], again.said
        if not made:
            assert os.listdir(home) == ["made"], f"{os.listdir(home)} is left after a kill at write {number}"
            assert contents <= {path.name for path in (home / "made").iterdir()}
        tried, longest = tried + 1, max(longest, done.seconds)
        shutil.rmtree(home)
    return Outcome(f"at {tried} writes: whole or not there; the same command made it, and nothing else stayed", longest)


IMPORTING = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
module = sys.argv[1]
def hook(event, args):
    if event == "import" and args[0] == module:
        print(time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
import attnlab.__main__
sys.argv[:] = ["attnlab", *sys.argv[2:]]
attnlab.__main__.program()
"""


def interrupted_while_it_imports(lab: Lab) -> Outcome:
    """Ctrl-C as one of these modules begins to be imported."""
    modules = ("tyro", "attnlab.cli.options", "torch", "accelerate.accelerator")
    longest = 0.0
    for module in modules:
        out = lab.new()
        command = [sys.executable, "-c", IMPORTING, module, *lab.words(out, {}, False)]
        done = subprocess.run(command, capture_output=True, text=True, env=lab.env, timeout=PROMPT)
        seconds = time.time() - float(done.stdout.split()[0])
        assert done.returncode == 130 and done.stderr == "\nattnlab: stopped\n", (module, done)
        assert not out.exists(), "a folder is left"
        longest = max(longest, seconds)
    return Outcome(f"exit code 130 and one line, while {', '.join(modules)} were imported", longest)


UNHEARD = {  # how streams break -> what a shell adds to the command for that
    "a reader that ends after one line": "2>&1 >/dev/null | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}",
    "a full disk behind stderr": "2>/dev/full",
    "stdout and stderr that are closed": ">&- 2>&-",
}


def unheard(lab: Lab) -> Outcome:
    """Progress that cannot be written is dropped, and the run ends with the same bits."""
    whole = lab.whole()
    longest = 0.0
    for how, redirected in UNHEARD.items():
        out = lab.new()
        began = time.time()
        command = f"{shlex.join([sys.executable, '-m', 'attnlab', *lab.words(out, {}, False)])} {redirected}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=lab.env, timeout=PROMPT)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (how, done)
        same(out, whole)
        longest = max(longest, time.time() - began)
    return Outcome(f"exit code 0 and the same bits, with {', '.join(UNHEARD)}", longest)


# the table


FAULTS: dict[str, Callable[[Lab], Outcome]] = {
    "kill -9 at every write": killed_at_every_write,
    "kill -9 within every file": killed_within_every_file,
    "kill -9 while it resumes": killed_while_it_resumes,
    "kill -9 of one of two processes that save": killed_one_of_two,
    **{
        f"{do} during {at}": partial(stopped, at=at, number=number, step=step, do=do)
        for at, number, step in (("start", 1, 0), ("step", 7, 7), ("evaluation", 2, 4), ("saving", 2, 4))
        for do in ("SIGTERM", "SIGINT")
    },
    **{
        f"SIGTERM to one of two processes during {at}": partial(
            stopped, at=at, number=number, step=step, do="SIGTERM", options=SHARDED, processes=2, rank=1
        )
        for at, number, step in (("step", 7, 7), ("evaluation", 2, 4), ("saving", 2, 4))
    },
    "SIGTERM while what is to be the best is evaluated": partial(
        stopped, at="evaluation", number=2, step=4, do="SIGTERM", options=WORSE
    ),
    "SIGTERM during compilation": partial(stopped, at="compilation", number=1, step=1, do="SIGTERM", options=COMPILED),
    "SIGINT during compilation, to the compiler too": partial(
        stopped, at="compilation", number=1, step=1, do="SIGINT", options=COMPILED, to="group"
    ),
    "kill -9 of one of two workers of torchrun": worker_killed,
    "the same, with --max-restarts=1": worker_restarted,
    "an exception in one of two workers": worker_raises,
    "SIGTERM to torchrun": launcher_stopped,
    "no space for a checkpoint": partial(disk_full, bytes=8000),
    "no space for a record": partial(disk_full, bytes=1500),
    "a disk of 2 MB that is full": small_disk_full,
    "guard stop, a loss that is NaN": partial(stops, kind="nan"),
    "guard stop, a spike": partial(stops, kind="spike", more={"train.spike": 1}),
    "guard skip, a loss that is NaN": partial(skips, kind="nan"),
    "guard skip, a gradient that overflows": partial(skips, kind="overflow"),
    "guard skip, NaN in a mixture of experts": partial(
        skips, kind="nan", more={"model.ff": "moe", "model.balance": "bias", "model.n-experts": 3}
    ),
    "guard skip, a spike": partial(skips, kind="spike", more={"train.spike": 1}),
    "guard rewind, a loss that is NaN": partial(rewinds, kind="nan"),
    "guard rewind, a spike": partial(rewinds, kind="spike", more={"train.spike": 1}),
    "guard rewind, kill -9 around it": killed_around_a_rewind,
    "guard rewind, NaN for ever": gives_up,
    "guard skip, NaN in one of two processes": partial(decided_alike, guard="skip"),
    "guard rewind, NaN in one of two processes": partial(decided_alike, guard="rewind"),
    "float16 gradients that overflow": overflows,
    "two processes in one run folder": second_process,
    "streams that break": unheard,
    "kill -9 of a conversion that writes its folder": partial(
        killed_while_it_writes_a_folder, words=("convert", "--to", "gqa"), contents={"config.json", "certificate.json"}
    ),
    "kill -9 of an export that writes its folder": partial(
        killed_while_it_writes_a_folder, words=("export",), contents={"config.json", "README.md", "model.safetensors"}
    ),
    "SIGINT during imports": interrupted_while_it_imports,
}


def shown(seconds: float) -> str:
    return "< 0.1" if 0 < seconds < 0.1 else f"{seconds:.1f}" if seconds else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only faults with this in their name")
    options = parser.parse_args()
    chosen = {name: fault for name, fault in FAULTS.items() if options.only in name}
    if not chosen:
        parser.error(f"--only {options.only!r} is in no name; the faults are {'; '.join(FAULTS)}")
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as home:
        lab = Lab(Path(home), fast=False)
        try:
            for number, (name, fault) in enumerate(chosen.items(), 1):
                say(f"{number}/{len(chosen)} {name}")
                try:
                    outcome, word = fault(lab), "yes"
                except NotPossible as error:
                    outcome, word = Outcome(str(error), 0.0), "not tried"
                except AssertionError as error:
                    say(str(error))
                    outcome, word = Outcome(str(error).partition("\n")[0], 0.0), "NO"
                survived += word == "yes"
                rows.append([name, word, shown(outcome.seconds), outcome.words])
        finally:
            lab.close()
    head = ["fault", "survived", "s until all had ended", "what happened"]
    print(f"{provenance()}\n\n{markdown(head, rows).replace('---: |', '--- |')}")
    say(f"{survived} of {len(chosen)} survived")
    return 0 if all(row[1] != "NO" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
