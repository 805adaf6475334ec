"""Runs `attnlab` with a fault in it, for benchmarks/faults.py.

    python fault_worker.py FAULT WORD ...    `attnlab WORD ...`, in which something goes wrong
    python fault_worker.py                   a server, which forks: PyTorch is imported once for all its jobs

FAULT is a JSON object. `at` and `number` say when: before the number-th time of start, step, evaluation, compilation,
saving (a file of a checkpoint) or write (anything that changes the run folder `out`), or when half of a file of a
checkpoint or half of a record is written. `do` says what: a signal, to this process or `to` its parent or group;
raise; full, a file at `fill` that takes all space; or limit, no file above so many bytes. `rank` is where (0). The
moment is noted in the file `mark`. `poison` maps a batch, by number from 0, to what it does on `ranks`: nan, spike,
overflow. A process that a launcher started again meets no fault but poison.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnlab.cli import main as cli
from attnlab.runs import checkpoint
from attnlab.runs import folder as run_folder
from attnlab.runs.launcher import rank, restarted
from attnlab.training import train
from attnlab.training.strategies import ddp, single

Act = Callable[[], None]


def main() -> int:
    as_on_avx2()
    if len(sys.argv) > 1:
        arm(json.loads(sys.argv[1]))
        return cli.main(sys.argv[2:])
    warm()
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)
    return 0


# faults


def arm(fault: dict[str, Any]) -> None:
    poison(
        {int(place): kind for place, kind in fault.get("poison", {}).items()},
        fault.get("ranks", [0]),
        Path(fault["mark"]),
    )
    if "at" in fault and rank() == fault.get("rank", 0) and not restarted():
        PLACES[fault["at"]](nth(fault.get("number", 1), lambda: strike(fault)), fault)


def strike(fault: dict[str, Any]) -> None:
    note(Path(fault["mark"]))
    do = fault["do"]
    if do == "raise":
        raise RuntimeError("the roof fell in")
    if do == "full":
        fill(Path(fault["fill"]))
    elif do == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    else:
        number = signal.Signals[do]
        {
            "self": lambda: os.kill(os.getpid(), number),
            "parent": lambda: os.kill(os.getppid(), number),
            "group": lambda: os.killpg(0, number),
        }[fault.get("to", "self")]()


def note(mark: Path) -> None:
    mark.write_text(str(time.time()))


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def nth(number: int, act: Act) -> Act:
    """Return a function that acts when it is called for the number-th time."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == number:
            act()

    return tick


def before(owner: Any, name: str, tick: Act, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    honest = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            tick()
        return honest(*args, **kwargs)

    setattr(owner, name, wrapped)


def at_write(tick: Act, fault: dict[str, Any]) -> None:
    """Before each call that changes the run folder or anything in it."""
    folder = fault["out"]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            changes, handle = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), -1
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            path, changes = args[0], True
            handle = -1 if event == "os.chmod" else args[-1]  # rmtree names what it removes by a folder's handle
        else:
            return
        if not changes or not isinstance(path, (str, os.PathLike)):
            return
        place = os.path.join(os.readlink(f"/proc/self/fd/{handle}") if handle >= 0 else "", path)
        if place == folder or place.startswith(folder + os.sep):
            tick()

    sys.addaudithook(hook)


def at_half(tick: Act, fault: dict[str, Any]) -> None:
    honest = checkpoint.write_file

    def write(path: Path, content: bytes) -> dict[str, Any]:
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            tick()
        return honest(path, content)

    checkpoint.write_file = write


def at_half_line(tick: Act, fault: dict[str, Any]) -> None:
    honest = run_folder.RunFolder.log

    def log(self: run_folder.RunFolder, record: Any) -> None:
        path = self.path / "metrics.jsonl"
        held = path.read_bytes() if path.exists() else b""
        with open(path, "ab") as file:
            file.write(json.dumps(record)[:9].encode())
            file.flush()
            tick()
        path.write_bytes(held)
        honest(self, record)

    run_folder.RunFolder.log = log  # type: ignore[method-assign]


def at_compilation(tick: Act, fault: dict[str, Any]) -> None:
    """A compiler that sends the signal before it compiles. One to the group is a terminal's, which reaches compilers at
    whatever they do: each later one that is in the group sends it to itself."""
    mark, number, group = fault["mark"], fault["do"].removeprefix("SIG"), os.getpgid(0)
    to, again = f"{os.getpid()}", ":"
    if fault.get("to") == "group":
        to, again = f"-{group}", f'[ "$group" != {group} ] || kill -s {number} -- $$'
    compiler = Path(f"{mark}-g++")  # Inductor goes by the name: what is not g++ is given other options
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *cpp*|*hpp*|*.h*|*.o*)\nif [ -e {mark} ]; then\n'
        f"read -r pid name state parent group rest < /proc/$$/stat; {again}\nelse\n"
        f"date +%s.%N > {mark}; kill -s {number} -- {to}; sleep 0.2\nfi;; esac\n"
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    from torch._inductor import config

    config.cpp.cxx = (None, str(compiler))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(mark).with_suffix(".cache"))


def as_on_avx2() -> None:
    """Inductor asks for AVX2 alone, whatever else this processor has: the one instruction set is looked for by a
    compiler that may be killed, and without it the same step has other bits. Wider ones would hide that."""
    torch.cpu._is_avx512_supported = lambda: False


PLACES: dict[str, Callable[[Act, dict[str, Any]], None]] = {
    "start": lambda tick, _: before(train, "resolve", tick),
    "step": lambda tick, _: before(train.Trainer, "batch", tick),
    "evaluation": lambda tick, _: before(single.Strategy, "__call__", tick, lambda *_, plain=False, **__: plain),
    "compilation": at_compilation,
    "saving": lambda tick, _: before(checkpoint, "write_file", tick),
    "write": at_write,
    "half": at_half,
    "half line": at_half_line,
}


def poison(places: dict[int, str], ranks: list[int], mark: Path) -> None:
    """Make the loss or the gradient of some steps wrong, in some ranks, each time that they are made."""
    if not places or rank() not in ranks:
        return
    kind = ""
    batch = train.Trainer.batch

    def read(self: train.Trainer, step: int) -> Any:
        nonlocal kind
        kind = places.get(step, "")
        return batch(self, step)

    train.Trainer.batch = read  # type: ignore[method-assign]
    for owner in (single.Strategy, ddp.Strategy):
        spoil(owner, lambda: kind, mark)


def spoil(owner: Any, kind: Callable[[], str], mark: Path) -> None:
    honest = owner.__call__

    def call(self: Any, x: Any, y: Any, documents: Any = None, plain: bool = False) -> torch.Tensor:
        loss: torch.Tensor = honest(self, x, y, documents, plain)
        if plain or not kind():
            return loss
        if not mark.exists():
            note(mark)
        return {
            "nan": lambda: loss * float("nan"),
            "spike": lambda: loss + 5,
            "overflow": lambda: loss + 1e36 * (loss - loss.detach()),  # only its gradient is wrong
        }[kind()]()

    owner.__call__ = call


# the server


def warm() -> None:
    """One small run, so that no child has to import anything, or to look at what its parent had made."""
    with tempfile.TemporaryDirectory() as home, open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        with contextlib.redirect_stdout(nowhere):
            (Path(home) / "text.txt").write_text("pack my box with five dozen liquor jugs\n" * 50)
            shape = (
                "--model.context 8 --model.n-layers 1 --model.d-model 8 --model.n-heads 1 --train.steps 1 --peak 1e9"
            )
            cli.main(["train", "quick", "--data", f"text:{home}/text.txt", "--out", f"{home}/run", *shape.split()])
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "what forks may have one thread"


def serve(words: list[str], fault: dict[str, Any], processes: int, log: str, timeout: float) -> dict[str, Any]:
    """Exit codes by rank, negative for a signal, and whether all ended in time. What they say is in the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = []
    for number in range(processes):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            if processes > 1:
                os.environ |= {
                    name: str(value) for name, value in (group | {"RANK": number, "LOCAL_RANK": number}).items()
                }
            child(words, fault, log)
        pids.append(pid)
    codes: dict[int, int] = {}
    last = time.monotonic() + timeout
    while len(codes) < processes and time.monotonic() < last:
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    ended = time.time()
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return {"codes": [codes.get(pid, -signal.SIGKILL) for pid in pids], "hung": len(codes) < processes, "ended": ended}


def child(words: list[str], fault: dict[str, Any], log: str) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(handle, number)
        arm(fault)
        code = cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
