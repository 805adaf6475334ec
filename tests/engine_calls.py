"""The calls that tests/comparison/test_engines.py makes: functions of a module that other processes import quickly."""

from __future__ import annotations

import json
import os
import signal
import time

from attnlab.errors import UserError


def square(folder, x, report):
    write(folder, {"step": 1})
    return x * x, os.getpid()


def fails(folder, kind, report):
    """Dies or fails: always, or only "once"."""
    tries = folder / "tries"
    count = int(tries.read_text()) + 1 if tries.exists() else 1
    folder.mkdir(exist_ok=True)
    tries.write_text(str(count))
    if kind.endswith("once") and count > 1:
        return count
    if kind.startswith("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"user": UserError("a bad field"), "bug": ZeroDivisionError("by nothing"), "disk": OSError("no disk")}[
        kind.split()[0]
    ]


def write(folder, record):
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def until_interrupted(folder, report):
    write(folder, {"step": 1})
    try:
        for _ in range(6000):
            time.sleep(0.05)
    except KeyboardInterrupt:
        write(folder, {"step": 2})  # "saves"
        raise
