"""Engines: what goes in comes out, what the machine spoilt is made again, and a driver that died is taken up."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import fake_slurm
import pytest
from engine_calls import fails, square, until_interrupted, write
from helpers import random_words, tiny_model, tiny_run, tiny_training

from attnlab.comparison import compare as module
from attnlab.comparison.engines import Call, Local, Needs, Ray, Share, Slurm, remote, slurm
from attnlab.comparison.grid import Comparison, grid, sweep
from attnlab.config import to_dict
from attnlab.errors import UserError
from attnlab.files import alone, read_json
from attnlab.results import RunResult

HERE = Path(__file__).parents[1]
SLURM_HERE = Slurm(cluster="local", time="60")


@pytest.fixture
def importable(monkeypatch):
    """Other processes find this file as this one does; engines must hand the variable on."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(slurm, "GRACE", 0.2)
    monkeypatch.setattr(remote.Remote, "pause", 0.1)
    monkeypatch.setattr(slurm.OnSlurm, "pause", 0.1)


def told(kind, calls, folder, **needs):
    heard = []
    with kind.open(Needs(runs=len(calls), folder=folder, threads=1, device="cpu", **needs)) as engine:
        engine.run(calls, lambda *message: heard.append(message))
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Local(), Ray(), SLURM_HERE], ids=lambda kind: type(kind).__name__)
def test_what_the_machine_spoilt_is_made_once_more_and_spoils_nothing_else(kind, tmp_path, importable):
    whats = ["user", "bug", "disk once", "dies once", "dies"]
    calls = [Call(fails, (tmp_path / what, what), tmp_path / what) for what in whats]
    calls += [Call(square, (tmp_path / f"square {n}", n), tmp_path / f"square {n}") for n in (3, 5)]
    heard = told(kind, calls, tmp_path, jobs=2)
    done = {number: value for number, what, value in heard if what == "done"}
    assert {number: done[number][0] for number in (5, 6)} == {5: 9, 6: 25} and done[2] == done[3] == 2
    assert all(done[number][1] != os.getpid() for number in (5, 6))
    again = {number: value for number, what, value in heard if what == "again"}
    assert set(again) == {2, 3, 4} and "no disk" in again[2]
    failed = {number: value for number, what, value in heard if what == "failed"}
    assert set(failed) == {0, 1, 4} and failed[0] == "a bad field"
    assert failed[1].startswith("ZeroDivisionError: by nothing (engine_calls.py, line") and len(failed[4]) > 10
    assert [(tmp_path / what / "tries").read_text() for what in whats] == ["1", "1", "2", "2", "2"]
    for number, begun in enumerate([1, 1, 2, 2, 2, 1, 1]):
        own = [what for n, what, _ in heard if n == number and what != "note"]
        assert own.count("start") == begun and own[0] == "start" and own[-1] in ("done", "failed")
    if not isinstance(kind, Local):  # who hears of its runs through their folders
        assert [value for n, what, value in heard if n == 5 and what == "event"] == [{"step": 1}]


@pytest.mark.slow
def test_an_interrupt_lets_tasks_of_ray_save(tmp_path, importable):
    heard = []

    def interrupt(*message):
        heard.append(message)
        if message[1] == "event" and message[2] == {"step": 1}:
            os.kill(os.getpid(), signal.SIGINT)

    calls = [Call(until_interrupted, (tmp_path / "a",), tmp_path / "a"), Call(square, (tmp_path / "b", 3))]
    with Ray().open(Needs(runs=2, folder=tmp_path, jobs=1, device="cpu")) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.run(calls, interrupt)
    assert [(n, what) for n, what, _ in heard] == [(0, "start"), (0, "event"), (0, "event"), (0, "interrupted")]
    assert heard[2][2] == {"step": 2}


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_submitted_again(preset, tmp_path, importable, slurm_path):
    preset = replace(preset, train=replace(preset.train, steps=100_000, save_every=100_000))
    cell, heard = grid(Comparison(preset, ["mha"], 1), tmp_path).cells[0], []

    def cancel(*message):
        heard.append(message)
        if [what for _, what, _ in heard].count("event") == 1 == (message[1] == "event"):
            subprocess.run(["scancel", *os.listdir(slurm_path / "jobs")], check=True)

    (tmp_path / "runs").mkdir()
    with Slurm().open(Needs(runs=1, folder=tmp_path, device="cpu")) as engine:
        engine.run([cell.call], cancel)
    assert heard[-1][1] == "interrupted" and len(os.listdir(slurm_path / "jobs")) == 1
    result = cell.result()
    assert result is not None and result.status == "interrupted" and result.steps > 0
    assert (cell.folder / f"step-{result.steps:08d}").exists()


def test_a_tail_reads_what_is_added_and_all_of_a_new_file(tmp_path):
    write(tmp_path, {"step": 1})
    tail = remote.Tail(tmp_path)
    assert tail.news() == []
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n{"st')
        file.flush()
        assert tail.news() == [{"step": 2}]
        file.write('ep": 3}\n')
    assert tail.news() == [{"step": 3}]
    (tmp_path / "new").write_text('{"step": 1}\n')
    os.replace(tmp_path / "new", tmp_path / "metrics.jsonl")
    assert tail.news() == [{"step": 1}] and tail.news() == []
    assert remote.Tail(tmp_path / "nowhere").news() == []


# A run folder has one writer


def hold(folder, ready):
    with alone(folder, "trains into"):
        ready.set()
        time.sleep(60)


def test_a_folder_is_held_by_one_process_and_released_by_its_death(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path / "run", ready), daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=r"another process trains into .*run: wait until it has ended"):
        with alone(tmp_path / "run", "trains into", patience=0.3):
            pass
    other.kill()
    other.join()
    with alone(tmp_path / "run", "trains into", patience=5):
        pass


# Comparisons


@pytest.fixture
def preset(tmp_path):
    train = tiny_training(steps=30, log_every=5, eval_every=15, save_every=10)
    return tiny_run(tmp_path, text=random_words(), model=tiny_model(vocab_size=8, n_layers=1), train=train)


def outcome(found):
    return {(c["mechanism"], c["seed"]): (c["curve"], c["train_curve"], c["status"]) for c in found["cells"]}


@pytest.fixture
def slurm_path(tmp_path, monkeypatch):
    """A machine with a Slurm of its own."""
    home = tmp_path / "slurm"
    monkeypatch.setenv("PATH", f"{fake_slurm.make(home)}{os.pathsep}{os.environ['PATH']}")
    yield home
    for job in (home / "jobs").iterdir():
        if not (job / "state").exists():
            os.killpg(int((job / "pid").read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_an_engine_changes_nothing_about_the_results(engine, preset, tmp_path, importable, slurm_path):
    kind = {"ray": Ray(), "slurm": Slurm(sbatch=("mem=1G",))}[engine]
    both = Comparison(preset, ["mha", "mqa"], 1)
    here = module.compare(both, tmp_path / "here", share=Share(jobs=1, threads=1), extras=())
    there = module.compare(both, tmp_path / "there", engine=kind, share=Share(threads=1), extras=("attention",))
    assert outcome(here) == outcome(there) and {c["status"] for c in there["cells"]} == {"done"}
    assert [entry["mechanism"] for entry in read_json(tmp_path / "there" / "attention.json")] == ["mha", "mqa"]
    if engine == "slurm":
        scripts = [(job / "script").read_text() for job in (slurm_path / "jobs").iterdir()]
        assert len(scripts) == 2 and all("#SBATCH --mem=1G" in text for text in scripts)
        assert read_json(tmp_path / "there" / "jobs-slurm" / "jobs.json") == {}


DRIVER = """
import json, sys
from attnlab.comparison import compare, engines, grid
from attnlab.config import RunConfig, from_dict

if __name__ == "__main__":
    kind = {"local": engines.Local(), "submitit": engines.Slurm(cluster="local"), "slurm": engines.Slurm()}[sys.argv[1]]
    config = from_dict(RunConfig, json.load(open(sys.argv[2])))
    both = grid.Comparison(config, ["mha", "mqa"], 1)
    compare.compare(both, sys.argv[3], engine=kind, share=engines.Share(jobs=2, threads=1), extras=())
"""


def drive(engine, config, out):
    driver, given = out.parent / "driver.py", out.parent / "config.json"
    driver.write_text(textwrap.dedent(DRIVER))
    given.write_text(json.dumps(to_dict(config)))
    return subprocess.Popen([sys.executable, driver, engine, given, out], stderr=subprocess.DEVNULL)


def until(what, seconds=90):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "submitit", "slurm"])
def test_a_driver_that_was_killed_is_taken_up(engine, preset, tmp_path, importable, slurm_path):
    preset = replace(preset, train=replace(preset.train, steps=700, log_every=50, eval_every=350, save_every=200))
    out = tmp_path / "out"
    driver = drive(engine, preset, out)
    until(lambda: len(list(out.glob("runs/*/metrics.jsonl"))) == 2)
    driver.kill()
    driver.wait()
    jobs = {path.name for path in out.glob("jobs-*/[0-9]*_submitted.pkl")} | set(os.listdir(slurm_path / "jobs"))
    driver = drive(engine, preset, out)
    assert driver.wait(120) == 0
    after = {path.name for path in out.glob("jobs-*/[0-9]*_submitted.pkl")} | set(os.listdir(slurm_path / "jobs"))
    assert after == jobs and len(jobs) == (0 if engine == "local" else 2), "submitted once"
    found = read_json(out / "compare.json")
    assert [(c["status"], c["attempts"], c["steps"]) for c in found["cells"]] == [("done", 1, 700)] * 2
    for cell, folder in zip(found["cells"], sorted((out / "runs").iterdir()), strict=True):
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [s for s, _ in cell["train_curve"]] == list(range(50, 750, 50)) and steps == sorted(steps)


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_goes_on_in_another(preset, tmp_path, importable):
    preset = replace(preset, train=replace(preset.train, steps=1500, log_every=50, eval_every=750, save_every=5000))
    sent = []

    def warn(event):
        (file,) = (tmp_path / "out").glob("runs/*/run.json")
        children = subprocess.run(["pgrep", "-f", f"submitit.core._submit {tmp_path}"], capture_output=True, text=True)
        if not sent and (pids := children.stdout.split()):
            sent.append(file)
            os.kill(int(pids[0]), signal.SIGUSR2)  # as Slurm does some time before the end

    call = grid(Comparison(preset, ["mha"], 1), tmp_path / "out").cells[0].call
    (tmp_path / "out" / "runs").mkdir(parents=True)
    heard = []
    with SLURM_HERE.open(Needs(runs=1, folder=tmp_path / "out", threads=1, device="cpu")) as engine:
        engine.run([call], lambda *message: (heard.append(message), message[1] == "event" and warn(message[2])))
    assert sent and heard[-1][1] == "done" and "again" not in [what for _, what, _ in heard]
    result = RunResult.from_dict(read_json(call.folder / "result.json"))
    assert result.status == "done" and [s for s, _ in result.train_curve] == list(range(50, 1550, 50))
    (log,) = (tmp_path / "out" / "jobs-local").glob("*_log.out")
    assert log.read_text().count("Starting with") == 2, "in two sittings"


def test_jobs_are_refused_in_one_sentence(preset, tmp_path, importable, slurm_path):
    (slurm_path / "refuse").write_text("sbatch: error: invalid partition specified: gpux\n")
    with pytest.raises(UserError, match=r"sbatch refused a job .*invalid partition specified: gpux.*--dry-run"):
        module.compare(Comparison(preset, ["mha"], 1), tmp_path / "out", engine=Slurm(partition="gpux"))


def test_an_interrupt_leaves_jobs_alone_and_says_how_to_end_them(preset, tmp_path, importable, slurm_path):
    def interrupt(number, what, value):
        if what == "note":
            os.kill(os.getpid(), signal.SIGINT)

    call = Call(time.sleep, (60,), tmp_path / "run")
    with Slurm().open(Needs(runs=1, folder=tmp_path / "out")) as engine:
        with pytest.raises(KeyboardInterrupt, match=r"left alone, and 'scancel \d+' ends them"):
            engine.run([call], interrupt)
    (number,) = os.listdir(slurm_path / "jobs")
    assert read_json(tmp_path / "out" / "jobs-slurm" / "jobs.json") == {"run": number}
    until((slurm_path / "jobs" / number / "pid").exists)


def test_a_dry_run_shows_the_batch_file_and_submits_nothing(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a place/src")
    monkeypatch.setenv("PATH", "/nowhere")
    out = tmp_path / "out"
    both = Comparison(preset, ["mha", "mqa"], 1)
    anywhere = replace(both, preset=replace(preset, train=replace(preset.train, device="auto")))
    cells = sweep(anywhere, out).cells
    options = Slurm(
        partition="gpu", time="1-2:30", account="lab", sbatch=("mem=32G", "constraint=a100&big", "exclusive")
    )
    text = module.foresee(anywhere, out, options, Share(threads=4, gpus=2))
    for line in (
        "#!/bin/bash",
        f"#SBATCH --job-name={cells[0].folder.name}",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=1590",
        "#SBATCH --account=lab",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=32G",
        "#SBATCH --constraint='a100&big'",
        "#SBATCH --exclusive",
        "export PYTHONPATH='/a place/src'",
        "export OMP_NUM_THREADS=4",
    ):
        assert line in text.splitlines(), line
    assert "submitit.core._submit" in text and cells[1].folder.name in text and "2 of 2 runs" in text
    assert not out.exists()
    assert "--gpus-per-node" not in module.foresee(both, out, options)
    for kind, said in ((Ray(), "on Ray (local), 3 side by side, 2 CPUs"), (SLURM_HERE, "3 at a time")):
        assert said in module.foresee(both, out, kind, Share(threads=2, jobs=3))
    assert "here, 1 side by side, 2 threads" in module.foresee(both, out, Local(), Share(threads=2, jobs=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("5:30", 6), ("4:00:00", 240), ("0:00:01", 1), ("2-0", 2880), ("1-2:30", 1590), ("1-0:0:1", 1441)],
)
def test_times_are_read_as_sbatch_reads_them(text, expected):
    assert slurm.minutes(text) == expected


def test_bad_input_is_one_sentence(tmp_path, monkeypatch):
    needs = Needs(runs=1, folder=tmp_path)
    for options, said in [
        (Slurm(time="soon"), "--slurm.time is 'soon'"),
        (Slurm(time="0"), "--slurm.time is '0'"),
        (Slurm(sbatch=("mem 32G",)), "--slurm.sbatch has 'mem 32G'"),
    ]:
        with pytest.raises(UserError, match=said):
            options.open(needs)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"found no sbatch here.*--dry-run"), Slurm().open(needs):
        pass
    for address in ("127.0.0.1:1", "nonsense"):
        with (
            pytest.raises(UserError, match=f"Ray cannot be reached at '{address}'.*--ray-address"),
            Ray(address).open(needs),
        ):
            pass
    for name, value in (("jobs", 0), ("threads", 0), ("gpus", -1)):
        with pytest.raises(UserError, match=f"{name} is {value}"):
            replace(needs, **{name: value})
    with pytest.raises(UserError, match="leave --gpus to the engines ray and slurm"):
        Local().open(replace(needs, gpus=1))
    for name, kind in (("ray", Ray()), ("submitit", Slurm())):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf"needs {name}.*pip install 'attnlab\[scale\]'"):
                kind.open(needs)


def test_two_drivers_do_not_share_a_comparison(preset, tmp_path):
    with alone(tmp_path / "out", "compares in"), contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(UserError, match="another process compares in"))
        module.compare(Comparison(preset, ["mha"], 1), tmp_path / "out", share=Share(jobs=1))


@pytest.mark.parametrize("held", [["7"], {"run": 7}, {"run": "../7"}, {"run": "/7"}, {"run": ""}, {"run": None}, None])
def test_a_book_lists_ids_of_jobs(held, tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"jobs.json.*and jobs are submitted anew"):
        slurm.read_book(tmp_path / "jobs.json")
    (tmp_path / "jobs.json").write_text(json.dumps({"run": "17", "other": "17_3"}))
    assert slurm.read_book(tmp_path / "jobs.json") == {"run": "17", "other": "17_3"}
