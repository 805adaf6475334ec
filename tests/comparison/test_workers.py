from __future__ import annotations

import io
import os
import signal
import threading
import time

from rich.console import Console

from attnlab.comparison.engines import Call
from attnlab.comparison.engines.local import Workers
from attnlab.errors import UserError
from attnlab.terminal.progress import Progress

# What the workers are asked to do: functions of a module, because they must pickle.


def square(x, report):
    import torch

    report({"step": 1})
    return x * x, os.getpid(), torch.get_num_threads()


def fail(kind, report):
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("a bad field") if kind == "user" else ZeroDivisionError("by nothing")


def until_interrupted(report):
    report({"step": 1})
    try:
        for _ in range(600):
            time.sleep(0.05)
    except KeyboardInterrupt:
        report({"step": 2})  # "saves"
        raise


def told(jobs, calls, on=lambda *_: None):
    heard = []

    def tell(*message):
        heard.append(message)
        on(*message)

    with Workers(jobs, 1) as workers:
        try:
            workers.run([Call(*call) for call in calls], tell)
        except KeyboardInterrupt:
            heard.append("KeyboardInterrupt")
    return heard


def test_every_outcome_is_told_and_a_bad_call_spoils_no_other():
    calls = [(square, (3,)), (fail, ("user",)), (fail, ("die",)), (fail, ("bug",)), (square, (5,)), (square, (7,))]
    heard = told(2, calls)
    values = {number: value for number, what, value in heard if what == "done"}
    assert {number: value[0] for number, value in values.items()} == {0: 9, 4: 25, 5: 49}
    assert all(pid != os.getpid() and threads == 1 for _, pid, threads in values.values())
    failures = {number: value for number, what, value in heard if what == "failed"}
    assert failures[1] == "a bad field"
    assert failures[2] == "its process ended: killed by SIGKILL, perhaps for want of memory"
    assert failures[3].startswith("ZeroDivisionError: by nothing (test_workers.py, line")
    assert [number for number, what, _ in heard if what == "event"].count(4) == 1
    assert sorted(number for number, what, _ in heard if what == "start") == [0, 1, 2, 2, 3, 4, 5], "who died, again"


def test_one_job_runs_here():
    heard = told(1, [(square, (3,)), (fail, ("bug",)), (square, (4,))])
    assert [what for _, what, _ in heard] == ["start", "event", "done", "start", "failed", "start", "event", "done"]
    assert heard[2][2][:2] == (9, os.getpid())


def test_an_interrupt_lets_calls_under_way_save_and_begins_no_other():
    begun = set()

    def on(number, what, _):
        if what == "event":
            begun.add(number)
            if len(begun) == 2 and not sent:
                sent.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
                sent[0].start()

    sent: list[threading.Timer] = []
    heard = told(2, [(until_interrupted, ()), (until_interrupted, ()), (square, (3,))], on)
    assert heard[-1] == "KeyboardInterrupt"
    assert {(n, what) for n, what, _ in heard[:-1] if n == 2} == set()
    for number in (0, 1):
        own = [(what, value) for n, what, value in heard[:-1] if n == number]
        assert own[-2:] == [("event", {"step": 2}), ("interrupted", None)]


def show(terminal: bool) -> str:
    out = io.StringIO()
    with Progress(20, console=Console(file=out, force_terminal=terminal, width=120)) as progress:
        first = progress.begin("mla, seed 0", 10)
        second = progress.begin("mha, seed 0", 10)
        for step in range(1, 11):
            first({"step": step, "loss": 4.0 / step, "tokens_per_s": 12_345.0})
        first({"step": 10, "val_loss": 1.25})
        second({"step": 5, "loss": 2.0})
        progress.end("mla, seed 0", "done, val 1.250")
        progress.say("a [line] that stays")
    return out.getvalue()


def test_progress_without_a_terminal_is_a_line_per_event():
    assert show(False).splitlines() == [
        "mla, seed 0: starts, 10 steps",
        "mha, seed 0: starts, 10 steps",
        "mla, seed 0: step 10/10  loss 0.400  val 1.250  12.3k tok/s",
        "mla, seed 0: done, val 1.250",
        "a [line] that stays",
    ]


def test_progress_on_a_terminal_shows_bars_and_the_whole():
    text = show(True)
    assert "total" in text and "15/20" in text and "mla, seed 0: done" in text and "a [line] that stays" in text


def test_an_interrupt_before_a_worker_is_up_ends_it_quietly(capfd):
    def on(number, what, _):
        if what == "start" and number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    heard = told(2, [(until_interrupted, ()), (until_interrupted, ())], on)
    assert heard[-1] == "KeyboardInterrupt"
    assert sorted(heard[2:-1]) == [(0, "interrupted", None), (1, "interrupted", None)]
    assert capfd.readouterr().err == ""
