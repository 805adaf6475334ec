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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnlab.checkpoint import RunFolder
from attnlab.results import RunResult

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
PROMPT = 60.0  # seconds in which all processes must have ended, once one of them has


class Done(NamedTuple):
    """What became of a command."""

    codes: list[int]  # of its processes by rank, or of the launcher; negative: the signal that ended it
    said: str
    seconds: float  # from the fault, or from the start where there was none, to the end of the last process


@dataclass
class Lab:
    """Runs commands in a folder of its own."""

    home: Path
    fast: bool = True  # processes are forked from a server, rather than started
    wholes: dict[str, Path] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        (self.home / "text.txt").write_text(TEXT)
        self.env = os.environ | {"OMP_NUM_THREADS": "1"}
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
        flags = [word for name, value in given.items() for word in ([f"--{name}", str(value)] if value != "" else [f"--{name}"])]
        return ["train", "quick", *flags, *(["--resume"] if resume else [])]

    def run(
        self,
        out: Path,
        fault: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        processes: int = 1,
        fast: bool | None = None,
        launcher: tuple[str, ...] = (),
        timeout: float = 180,
    ) -> Done:
        """`attnlab train`, with a fault."""
        self.count += 1
        mark, log = self.home / f"mark-{self.count}", self.home / f"log-{self.count}"
        fault = dict(fault or {}) | {"mark": str(mark), "out": str(out)}
        words, began = self.words(out, options or {}, resume), time.time()
        if self.fast if fast is None else fast:
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
                    process.kill()
                    hung, codes = True, [process.wait()]
            ended = time.time()
        said = log.read_text() if log.exists() else ""
        assert not hung, f"not all processes ended within {timeout:.0f} s:\n{said[-3000:]}"
        return Done(codes, said, ended - (float(mark.read_text()) if mark.exists() else began))

    def whole(self, options: Mapping[str, Any] | None = None, fault: Mapping[str, Any] | None = None, processes: int = 1) -> Path:
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
    return [result.status, result.steps, result.tokens, result.curve, result.train_curve, result.skipped, result.rewinds]


def curves(folder: RunFolder) -> list[list[Any]]:
    """The losses on record, in their order."""
    keys = ("step", "loss", "val_loss", "grad_norm", "skipped")
    return [[r.get(key) for key in keys] for r in folder.metrics() if "rewound_from" not in r]


def resumed(lab: Lab, out: Path, whole: Path, options: Mapping[str, Any] | None = None, fault: Mapping[str, Any] | None = None, processes: int = 1) -> None:
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
    fault: Mapping[str, Any] | None = None,
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
        others = [code for other, code in enumerate(done.codes) if other != rank]
        assert done.codes[rank] == -signal.SIGKILL, done
        assert all(code > 0 for code in others) and (not others or "is gone" in done.said), done
        found = newest(out)
        assert before is None or (found is not None and found >= before), f"point {number}: {found} after {before}"
        try:
            resumed(lab, out, whole, options, fault, processes)
        except AssertionError as error:
            raise AssertionError(f"killed at {at} {number} of rank {rank}, whose newest is {found}: {error}") from error
        tried, longest = tried + 1, max(longest, done.seconds)
        shutil.rmtree(out)
    return tried, longest
