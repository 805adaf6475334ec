"""Signs of life, in files."""

from __future__ import annotations

import os
import time

import pytest

from attnlab.files import read_json, write_json
from attnlab.runs.heartbeat import FOLDER, Heartbeat, beats, stale


def test_a_beat_says_who_and_how_far(tmp_path):
    before = time.time()
    Heartbeat(tmp_path, rank=3, ranks=5).beat(17)
    found = read_json(tmp_path / FOLDER / "rank-00003.json")
    assert found["step"] == 17 and found["rank"] == 3 and found["ranks"] == 5 and found["pid"] == os.getpid()
    assert before <= found["time"] <= time.time() and found["host"]


def test_it_is_written_now_and_then_only(tmp_path):
    often, seldom = Heartbeat(tmp_path, 0, 2, every=0.0), Heartbeat(tmp_path, 1, 2, every=3600.0)
    for step in range(4):
        often.beat(step)
        seldom.beat(step)
    assert [beat["step"] for beat in beats(tmp_path)] == [3, 0]
    assert sorted(file.name for file in (tmp_path / FOLDER).iterdir()) == ["rank-00000.json", "rank-00001.json"]


def test_who_has_not_been_heard_from_is_told(tmp_path):
    assert beats(tmp_path) == stale(tmp_path) == []
    for rank in (0, 1, 3):
        Heartbeat(tmp_path, rank, 4).beat(1)
    assert stale(tmp_path) == [2] and beats(tmp_path)[2] is None
    late = tmp_path / FOLDER / "rank-00001.json"
    write_json(late, read_json(late) | {"time": time.time() - 100})
    assert stale(tmp_path, after=60) == [1, 2] and stale(tmp_path, after=200) == [2]


def test_ranks_of_an_earlier_launch_are_not_missed(tmp_path):
    for rank in range(4):
        Heartbeat(tmp_path, rank, 4).beat(1)
        path = tmp_path / FOLDER / f"rank-{rank:05d}.json"
        write_json(path, read_json(path) | {"time": time.time() - 1000})
    Heartbeat(tmp_path, 0, 2).beat(2)
    assert stale(tmp_path) == [1]


@pytest.mark.parametrize("what", ["a file in its place", "no run folder"])
def test_a_heart_that_cannot_write_stops_nothing(tmp_path, what):
    run = tmp_path / "run"
    if what == "a file in its place":
        run.mkdir()
        (run / FOLDER).write_text("")
    Heartbeat(run).beat(1)
    assert beats(run) == []
