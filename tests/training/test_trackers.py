"""Trackers: the real libraries, each in two sittings, without a network and without a trace outside the run folder."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from attnlab.config import ModelConfig, RunConfig
from attnlab.errors import UserError
from attnlab.files import read_json
from attnlab.runs.folder import RunFolder
from attnlab.training import trackers
from attnlab.training.trackers import open_trackers, scalars

CONFIG = RunConfig(name="odd name/1", model=ModelConfig(mechanisms=("sliding", "mla")))
ALL = ("tensorboard", "wandb", "trackio")

SITTING = """
import socket, sys
from test_trackers import CONFIG, record
from attnlab.training.trackers import open_trackers

connect = socket.socket.connect
def near(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
    return connect(self, address)
socket.socket.connect = near

after, first, last = map(int, sys.argv[2:5])
with open_trackers(sys.argv[5:], sys.argv[1], CONFIG, after) as trackers:
    assert list(trackers.open) == sys.argv[5:], "one failed"
    for step in range(first, last + 1):
        trackers.log(record(step, first), step)
        if step % 2 == 0:
            trackers.log({"step": step, "val_loss": float(step)}, step)
"""

DISK_FULL = """
import resource, sys
from test_trackers import CONFIG
from attnlab.training.trackers import open_trackers
with open_trackers(["tensorboard"], sys.argv[1], CONFIG, -1, print) as trackers:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    for step in range(300):
        trackers.log({"loss": 1.0}, step)
print("trained to the end")
"""


def record(step: int, first: int) -> dict[str, object]:
    """As `train` makes them, and odder; who logged it shows in lr."""
    loss = math.nan if step == 3 else math.inf if step == 6 else 10.0 - step
    return {"step": step, "loss": loss, "lr": first / 100, "warm_up": True, "note": None, "ranks": [1, 2]}


def run(code: str, *words: object, home: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO", "HF_"))}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    own = {"HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("home", "tmp", "elsewhere"):
        (home / name).mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=home / "elsewhere", env=kept | own, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was tracked from step 1 to 6, and resumed from its checkpoint of step 4 to go on to 8."""
    place = tmp_path_factory.mktemp("tracked")
    (place / "run").mkdir()
    for sitting in [(-1, 1, 6), (4, 5, 8)]:
        done = run(SITTING, place / "run", *sitting, *ALL, home=place)
        assert done.returncode == 0, done.stderr
        assert done.stdout == done.stderr == ""
    return place


EXPECTED = [(step, 0.01 if step <= 4 else 0.05) for step in range(1, 9)]


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "run" / "track" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr", "val/loss"]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/lr")] == EXPECTED
    losses = [e.value for e in events.Scalars("train/loss")]
    assert math.isnan(losses[2]) and losses[5] == math.inf and losses[6:] == [3.0, 2.0]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert b"model.d_model" in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]


@pytest.mark.slow
def test_both_sittings_are_one_run_of_weights_and_biases(place: Path) -> None:
    ids = read_json(place / "run" / "track" / "ids.json")
    sittings = sorted((place / "run" / "track" / "wandb").glob("wandb/offline-run-*/*.wandb"))
    assert len(sittings) == 2
    for file, (first, last) in zip(sittings, [(1, 6), (5, 8)], strict=True):
        about, history = read_wandb(file)
        assert about.run_id == ids["id"] and about.display_name == ids["name"] and about.project == "attnlab"
        config = {update.key: json.loads(update.value_json) for update in about.config.update}
        assert config["model"]["mechanisms"] == ["sliding", "mla"] and config["train"]["lr"] == 1e-3
        assert [line["_step"] for line in history] == list(range(first, last + 1))
        assert all(line["train/lr"] == pytest.approx(first / 100) for line in history)
        assert [line.get("val/loss") for line in history if line["_step"] % 2 == 0] == list(
            range(first + first % 2, last + 1, 2)
        )
        assert not {"train/warm_up", "train/note", "train/ranks", "train/step"} & set().union(*history)


@pytest.mark.slow
def test_trackio_holds_each_step_once_in_one_run(place: Path) -> None:
    ids = read_json(place / "run" / "track" / "ids.json")
    database = sqlite3.connect(place / "run" / "track" / "trackio" / "attnlab.db")
    rows = database.execute("SELECT step, metrics, run_name, run_id FROM metrics ORDER BY id").fetchall()
    (config,) = database.execute("SELECT config FROM configs").fetchone()
    database.close()
    assert {name for _, _, name, _ in rows} == {ids["name"]} and len({id for *_, id in rows}) == 1
    metrics = [(step, json.loads(text)) for step, text, *_ in rows]
    assert [(step, each["train/lr"]) for step, each in metrics if "train/lr" in each] == EXPECTED
    assert [(step, each["val/loss"]) for step, each in metrics if "val/loss" in each] == [(n, n) for n in (2, 4, 6, 8)]
    assert json.loads(config)["model"]["mechanisms"] == ["sliding", "mla"]


@pytest.mark.slow
def test_nothing_is_written_elsewhere_and_nothing_runs_on(place: Path) -> None:
    assert [file for name in ("home", "tmp", "elsewhere") for file in (place / name).rglob("*")] == []
    assert [file.name for file in (place / "run").iterdir()] == ["track"]
    until = time.monotonic() + 20
    while (left := processes_of(place)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
def test_a_full_disk_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = run(DISK_FULL, tmp_path / "run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    said, end = done.stdout.splitlines()
    assert end == "trained to the end"
    assert said.startswith("tensorboard fails (") and said.endswith("left out from here on, and metrics.jsonl goes on")


class Fake:
    """A tracker that notes what it is told and fails where asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.told = fails, list[object]()

    @contextmanager
    def __call__(self, run: trackers.TrackerRun) -> Iterator[trackers.Write]:
        self.stage("opening")
        try:
            yield lambda values, step: (self.stage(f"step {step}"), self.told.append((step, values)))[1]
        except BaseException as error:
            self.told.append(type(error))
            raise
        finally:
            self.told.append("closed")
            self.stage("closing")

    def stage(self, name: str) -> None:
        if name == self.fails:
            raise OSError(f"no luck in {name}\nand more")


@pytest.mark.parametrize("fails", ["opening", "step 0", "step 1", "closing"])
def test_one_that_fails_is_dropped_and_the_others_go_on(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good, said = Fake(fails), Fake(), list[str]()
    monkeypatch.setitem(trackers.TRACKERS, "trackio", bad)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", good)
    with open_trackers(["trackio", "tensorboard"], tmp_path, CONFIG, -1, said.append) as opened:
        for step in range(3):
            opened.log({"step": step, "loss": 1.0}, step)
    assert good.told == [*((step, {"train/loss": 1.0}) for step in range(3)), "closed"]
    kept = {"opening": 0, "step 0": 0, "step 1": 1, "closing": 3}[fails]
    assert bad.told == good.told[:kept] + ["closed"] * (fails != "opening")
    assert said == [f"trackio fails (no luck in {fails}): it is left out from here on, and metrics.jsonl goes on"]


def test_what_ends_the_run_reaches_the_trackers_and_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {name: Fake() for name in ALL}
    for name, fake in fakes.items():
        monkeypatch.setitem(trackers.TRACKERS, name, fake)
    with pytest.raises(KeyboardInterrupt), open_trackers(ALL, tmp_path, CONFIG, -1) as opened:
        opened.log({"loss": 2}, 1)
        raise KeyboardInterrupt
    assert all(fake.told == [(1, {"train/loss": 2}), KeyboardInterrupt, "closed"] for fake in fakes.values())


def test_ids_stay_and_are_new_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Fake())
    found = []
    for name, after in [("a", -1), ("a", 3), ("b", -1)]:
        (tmp_path / name).mkdir(exist_ok=True)
        with open_trackers(["trackio", "trackio"], tmp_path / name, CONFIG, after):
            found.append(read_json(tmp_path / name / "track" / "ids.json"))
    assert found[0] == found[1] != found[2]


def test_a_resumed_run_keeps_what_was_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Fake())
    with open_trackers(["trackio"], tmp_path, CONFIG, -1):
        before = sorted(tmp_path.rglob("*"))
    RunFolder(tmp_path, CONFIG, {}).forget_after(-1)
    assert sorted(tmp_path.rglob("*")) == before != []


def test_no_tracker_leaves_no_trace(tmp_path: Path) -> None:
    with open_trackers([], tmp_path, CONFIG, -1) as opened:
        opened.log({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown tracker 'wandbb': expected one of .*; did you mean 'wandb'\?"):
        open_trackers(["wandbb"], tmp_path, CONFIG, -1).__enter__()
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"needs trackio, which is not installed: run pip install 'attnlab\[track\]'"):
        open_trackers(["trackio"], tmp_path, CONFIG, -1).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_names_say_what_numbers_are_of() -> None:
    held = {"step": 3, "val_loss": 1, "loss": 2.0, "tokens_per_s": 7, "warm_up": True, "mfu": math.inf, "a": None}
    assert scalars(held | {"words": "x", "ranks": [1.0]}) == {
        "val/loss": 1, "train/loss": 2.0, "train/tokens_per_s": 7, "train/mfu": math.inf
    }  # fmt: skip


def processes_of(place: Path) -> list[int]:
    """Those started by the sittings: their home is in the environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={place}".encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            pass  # another user's, or gone
    return found


def read_wandb(file: Path):
    """The run and the history in a .wandb file: LevelDB's log format behind seven bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, whole, about, history = file.read_bytes(), 7, b"", None, []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            held = proto.Record.FromString(whole)
            whole = b""
            about = held.run if held.WhichOneof("record_type") == "run" and about is None else about
            if held.WhichOneof("record_type") == "history":
                items = held.history.item
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    assert about is not None
    return about, history
