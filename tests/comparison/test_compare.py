from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import random_words, tiny_model, tiny_run, tiny_training
from rich.console import Console

from attnlab.comparison import compare as module
from attnlab.comparison import extras, grid
from attnlab.comparison.engines import Share
from attnlab.comparison.extras import attention_of, sample_of
from attnlab.comparison.grid import Cell, Comparison, sized
from attnlab.comparison.verdicts import summarize_task
from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.contrasts import Judging, of_losses
from attnlab.errors import UserError
from attnlab.evaluation import exam
from attnlab.files import read_json
from attnlab.model import parameters
from attnlab.presets import variant
from attnlab.results import LawResult, RunResult, TaskResult
from attnlab.terminal.comparison import table
from attnlab.terminal.progress import Progress
from attnlab.training.train import Diverged, train

QUIET = functools.partial(Progress, console=Console(quiet=True))
EXTRAS = ("laws.json", "samples.json", "attention.json")
BRIEF = ("attention",)  # workers are other processes, where nothing is patched


@pytest.fixture
def preset(tmp_path):
    train = tiny_training(steps=40, log_every=1, eval_every=20)
    return tiny_run(tmp_path, text=random_words(), model=tiny_model(vocab_size=8), train=train, seed=5)


@pytest.fixture
def no_laws(monkeypatch):
    """The laws have tests of their own, and take long, and so does a long sample."""
    monkeypatch.setattr(extras, "SAMPLE", 9)
    monkeypatch.setattr(extras, "check_mechanism", lambda name: [LawResult(law="l", mechanism=name, status="holds")])


def compare(preset, mechanisms, seeds, out, match="none", *, jobs=1, show=QUIET, extras=extras.EXTRAS, **which):
    comparison = Comparison(preset, mechanisms, seeds, match, **which)
    return module.compare(comparison, out, share=Share(jobs=jobs, threads=1), show=show, extras=extras)


def brief(preset, steps=4):
    return replace(preset, train=replace(preset.train, steps=steps))


def outcome(found):
    """What must not depend on how the runs were scheduled."""
    return {(c["mechanism"], c["seed"]): (c["curve"], c["train_curve"], c["status"], c["key"]) for c in found["cells"]}


def test_interrupted_and_continued_side_by_side_equals_one_after_the_other(preset, tmp_path, monkeypatch):
    run = functools.partial(compare, preset, ["mha", "sliding"], 2, extras=BRIEF)
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(Progress, "update", interrupt_at(9))
    with pytest.raises(KeyboardInterrupt, match=r"stopped; \d of 4 runs .* the same command goes on"):
        run(tmp_path / "parts", jobs=2)
    monkeypatch.undo()
    half = read_json(tmp_path / "parts" / "compare.json")
    saved = [cell for cell in half["cells"] if cell["status"] == "interrupted"]
    assert max(cell["steps"] for cell in saved) >= 9 and all(cell["steps"] < 40 for cell in saved)
    assert not (tmp_path / "parts" / "attention.json").exists()
    found = run(tmp_path / "parts", jobs=2)
    assert found == read_json(tmp_path / "parts" / "compare.json")
    assert outcome(found) == outcome(whole)
    assert [row["n"] for row in found["summary"]] == [2, 2]
    assert found["summary"] == whole["summary"]
    assert read_json(tmp_path / "parts" / "attention.json") == read_json(tmp_path / "whole" / "attention.json")


def interrupt_at(step):
    honest, sent = Progress.update, []

    def update(self, name, event):
        honest(self, name, event)
        if event.get("step", 0) >= step and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    return update


def test_an_interrupted_run_in_this_process_continues(preset, tmp_path, monkeypatch, no_laws):
    monkeypatch.setattr(Progress, "update", interrupt_at(9))
    with pytest.raises(KeyboardInterrupt, match="stopped; 0 of 1 runs"):
        compare(preset, ["mha"], 1, tmp_path)
    (cell,) = read_json(tmp_path / "compare.json")["cells"]
    assert cell["status"] == "interrupted" and cell["steps"] == 9
    (cell,) = compare(preset, ["mha"], 1, tmp_path)["cells"]
    assert cell["status"] == "done" and [step for step, _ in cell["train_curve"]] == list(range(1, 41))


def test_finished_runs_are_not_repeated(preset, tmp_path, monkeypatch, no_laws):
    preset = brief(preset)
    first = compare(preset, ["mha", "gqa"], [7], tmp_path)
    trained = []
    monkeypatch.setattr(grid, "train", lambda config, *args, **kw: trained.append(config) or train(config, *args, **kw))
    stamps = {file: (tmp_path / file).stat().st_mtime_ns for file in EXTRAS}
    again = compare(preset, ["mha", "gqa"], [7], tmp_path)
    assert not trained and again["cells"] == first["cells"]
    assert stamps == {file: (tmp_path / file).stat().st_mtime_ns for file in EXTRAS}
    wider = compare(preset, ["mha", "gqa", "mqa"], [7, 8], tmp_path)
    assert [(c.mechanism, c.seed) for c in trained] == [("mqa", 7), ("mha", 8), ("gqa", 8), ("mqa", 8)]
    assert [row["n"] for row in wider["summary"]] == [2, 2, 2]
    other = replace(preset, train=replace(preset.train, lr=3e-3))
    compare(other, ["mha"], [7], tmp_path)
    assert trained[-1].train.lr == 3e-3 and len(list((tmp_path / "runs").iterdir())) == 7


def test_pairs_share_their_batches_and_differ_in_the_mechanism_alone(preset, tmp_path):
    labels = ["mha", "mla", "sliding+mla"]
    work = grid.grid(Comparison(preset, labels, 2, options={"mla": {"kv_rank": 6}}), tmp_path)
    assert [str(cell) for cell in work.cells] == [
        f"{label} s{seed}" for seed in (5, 6) for label in ("mha", "mla", "sliding+mla")
    ]
    for cell in work.cells:
        assert cell.config.data == preset.data and cell.config.train == preset.train and cell.config.seed == cell.seed
        assert replace(cell.config.model, mechanisms=("mha",), options={}) == replace(
            preset.model, vocab_size=cell.config.model.vocab_size
        )
        assert cell.folder.name == f"{cell.label}-s{cell.seed}-{cell.config.key}"
    assert work.cells[1].config.model.options == {"mla": {"kv_rank": 6}}
    assert work.cells[2].config.model.mechanisms == ("sliding", "mla")


def test_what_was_matched_is_written(preset, tmp_path, no_laws):
    preset = replace(brief(preset), model=replace(preset.model, d_model=32, n_heads=4))
    found = compare(preset, ["mha", "gqa"], 1, tmp_path, "params")
    matched = found["matched"]["gqa"]
    counts = {cell["mechanism"]: cell["parameters"] for cell in found["cells"]}
    assert counts["gqa"] == matched["parameters"] and abs(counts["gqa"] / counts["mha"] - 1) <= 0.01
    assert matched["text"] == f"ff_dim 128 -> {matched['to']}" and matched["equal"] and matched["to"] > 128
    assert "mha" not in found["matched"]
    assert "ff_dim 128 -> " in shown(found)


def spoilt(monkeypatch, times, error):
    """Training of gqa fails so many times; the list of what was begun."""
    begun = []

    def broken(config, *args, **kwargs):
        begun.append(config.mechanism)
        if config.mechanism == "gqa" and begun.count("gqa") <= times:
            raise error
        return train(config, *args, **kwargs)

    monkeypatch.setattr(grid, "train", broken)
    return begun


def test_a_run_that_the_machine_spoilt_is_made_once_more_and_counted(preset, tmp_path, monkeypatch, no_laws):
    begun = spoilt(monkeypatch, 1, OSError("the disk went away"))
    console = Console(file=io.StringIO(), width=200)
    found = compare(brief(preset), ["gqa", "mha"], 1, tmp_path, show=functools.partial(Progress, console=console))
    assert begun == ["gqa", "mha", "gqa"], "after those that wait"
    assert "gqa s5: failed, and is tried once more: OSError: the disk went away" in console.file.getvalue()
    assert [(c["status"], c["attempts"]) for c in found["cells"]] == [("done", 2), ("done", 1)]
    again = compare(brief(preset), ["gqa", "mha"], 1, tmp_path)
    assert again["cells"] == found["cells"] and len(begun) == 3, "the count stays"


@pytest.mark.parametrize("error", [UserError("a bad field"), ValueError("a bug"), Diverged("the loss is nan")])
def test_what_would_fail_again_is_not_tried_again(preset, tmp_path, monkeypatch, no_laws, error):
    begun = spoilt(monkeypatch, 9, error)
    found = compare(brief(preset), ["gqa", "mha"], 1, tmp_path)
    assert begun == ["gqa", "mha"] and [c["attempts"] for c in found["cells"]] == [1, 1]
    assert found["cells"][0]["status"] == "failed" and str(error) in found["cells"][0]["error"]


def test_a_failed_run_is_told_and_tried_again(preset, tmp_path, monkeypatch, no_laws):
    preset = brief(preset)
    begun = spoilt(monkeypatch, 9, RuntimeError("the sky fell"))
    found = compare(preset, ["gqa", "mha"], 1, tmp_path)
    gqa, mha = found["cells"]
    assert begun == ["gqa", "mha", "gqa"] and gqa["attempts"] == 2
    assert gqa["status"] == "failed" and gqa["error"].startswith("RuntimeError: the sky fell")
    assert mha["status"] == "done" and found["baseline"] == "mha"
    assert found["summary"][0] | {"n": 0, "val_loss": None, "difference": None} == found["summary"][0]
    assert "gqa s5 failed twice: RuntimeError: the sky fell" in shown(found)
    monkeypatch.setattr(grid, "train", train)
    assert [c["status"] for c in compare(preset, ["gqa", "mha"], 1, tmp_path)["cells"]] == ["done"] * 2


def test_a_run_that_diverges_is_a_failed_run(preset, tmp_path, no_laws):
    preset = replace(preset, train=replace(preset.train, steps=30, lr=1e30, clip=0.0, warmup=0))
    (cell,) = compare(preset, ["mha"], 1, tmp_path)["cells"]
    assert cell["status"] == "failed" and "at step" in cell["error"] and cell["val_loss"] is None
    assert read_json(tmp_path / "samples.json") == []


def cell(mechanism, seed, loss, status="done"):
    return RunResult(name="r", mechanism=mechanism, seed=seed, key="k", status=status, val_loss=loss)


def test_verdicts_pair_the_seeds_that_both_have_finished():
    cells = [cell("mha", s, 2.0 + s / 10) for s in range(3)]
    cells += [cell("a", s, 1.9 + s / 10 + s / 1000) for s in range(3)]  # much the same gain at each seed
    cells += [cell("b", s, 2.0 + (-1) ** s / 10) for s in range(3)]
    cells += [cell("c", 0, 2.1), cell("c", 1, 9.0, "interrupted")]
    cells += [cell("d", 7, 1.0)]
    found, _ = of_losses(cells, ["mha", "a", "b", "c", "d", "e"], "mha", Judging("pairwise"))
    rows = {row["mechanism"]: row for row in found}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "mha": "baseline", "a": "better", "b": "undecided", "c": "too few seeds", "d": "too few seeds",
        "e": "too few seeds",
    }  # fmt: skip
    assert rows["a"]["difference"] == pytest.approx(-0.099)
    half = 6.16441 * 0.001 / 3**0.5  # t at 0.95**(1/2): two intervals together
    assert rows["a"]["interval"] == pytest.approx([-0.099 - half, -0.099 + half], abs=1e-5)
    assert rows["c"]["difference"] == pytest.approx(0.1) and rows["c"]["interval"] is None
    assert rows["d"]["difference"] is None and rows["d"]["val_loss"] == 1.0
    assert rows["e"] == {
        "mechanism": "e", "n": 0, "val_loss": None, "difference": None, "interval": None, "verdict": "too few seeds",
        "by": None, "pooled": None, "pairwise": None,
    }  # fmt: skip
    json.dumps(list(rows.values()), allow_nan=False)


def shown(found) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table(found))
    return out.getvalue()


def test_the_table_fits_a_terminal(preset, tmp_path, no_laws):
    found = compare(brief(preset), ["mha", "latent_lookup"], 2, tmp_path)
    lines = shown(found).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown(found)
    assert lines[1].split()[:1] == ["mha"] and "baseline" in lines[1]
    assert lines[2].split()[2] == f"{found['summary'][1]['difference']:+.4f}" and "±" in lines[2]
    mine, base = (found["cells"][i]["parameters"] for i in (-1, 0))
    said = " ".join(shown(found).split())
    assert f"latent_lookup has {100 * mine / base - 100:,.0f} % more parameters; --match params" in said


def test_attention_maps_are_rows_of_weights_over_earlier_tokens(preset, tmp_path):
    preset = brief(preset)
    for label in ("mha", "mka", "sliding+msla"):
        options = {"msla": {"top_k": 3, "local": 1}}
        train(variant(preset, label, options), tmp_path / label)
        (entry,) = attention_of(label, 5, tmp_path / label)
        assert len(entry["tokens"]) == 16 and "".join(entry["tokens"]).strip()
        assert [len(layer) for layer in entry["layers"]] == [2, 2]
        for layer in entry["layers"]:
            for head in layer:
                for query, row in enumerate(head):
                    assert len(row) == 16 and sum(row) == pytest.approx(1, abs=0.02)
                    assert all(weight == 0 for weight in row[query + 1 :])
    assert sum(weight > 0 for weight in entry["layers"][1][0][15]) == 3  # msla: top_k
    train(variant(preset, "latent_lookup"), tmp_path / "lookup")
    assert attention_of("latent_lookup", 5, tmp_path / "lookup") == []


def test_samples_stay_within_learned_positions(preset, tmp_path):
    preset = replace(brief(preset), model=replace(preset.model, positions="learned"))
    train(preset, tmp_path / "run")
    (entry,) = sample_of("mha", 5, tmp_path / "run")
    assert len(entry["prompt"] + entry["text"]) == 16


def test_bad_input_is_refused_before_anything_is_written(preset, tmp_path):
    out = tmp_path / "out"
    for arguments, what in [
        ((preset, ["mha", "mlaa"], 1, out), "unknown mechanism 'mlaa'"),
        ((preset, [], 1, out), "0 mechanisms and 1 seeds"),
        ((preset, ["mha"], 0, out), "seeds is 0: it must be at least 1"),
        ((preset, ["mha", "mla"], 1, out, "parms"), "unknown match 'parms'"),
        ((preset, ["latent_lookup", "mla"], 1, out, "cache"), "latent_lookup keeps no cache"),
        ((preset, ["mha", "msla"], 1, out), "top_k is 32 and the context 16"),
        ((replace(preset, data=DataConfig(source=f"text:{out}")), ["mha"], 1, out), "out"),
    ]:
        with pytest.raises(UserError, match=what):
            compare(*arguments)
    with pytest.raises(UserError, match="jobs is 0"):
        compare(preset, ["mha"], 1, out, jobs=0)
    with pytest.raises(UserError, match="a folder that you may write to"):
        compare(preset, ["mha"], 1, Path(preset.data.source[5:]))
    assert not (out / "compare.json").exists()


def test_without_scipy_nothing_is_trained(preset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"this needs scipy, .*pip install 'attnlab\[stats\]'"):
        compare(preset, ["mha"], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_baseline_is_mha_else_the_first(preset, tmp_path):
    assert grid.grid(Comparison(preset, ["mla", "mha"], 1), tmp_path).baseline == "mha"
    work = grid.grid(Comparison(preset, ["mla", "gqa"], 1, "params"), tmp_path)
    assert work.baseline == "mla" and list(work.matched) == ["gqa"]
    assert work.cells[0].config.model.ff_dim is None
    assert parameters(work.cells[1].config.model) == pytest.approx(parameters(work.cells[0].config.model), rel=0.01)


def test_heads_of_every_finished_run_when_asked(preset, tmp_path):
    kept = replace(preset, train=replace(preset.train, keep=0, save_every=2, steps=6))
    compare(kept, ["mha", "mla"], 2, tmp_path, extras=("heads",))
    found = json.loads((tmp_path / "heads.json").read_text())
    assert [(e["mechanism"], e["seed"]) for e in found] == [("mha", 5), ("mha", 6), ("mla", 5), ("mla", 6)]
    assert all(e["emergence"]["steps"] == [2, 4, 6] for e in found)
    before = (tmp_path / "heads.json").stat().st_mtime_ns
    compare(kept, ["mha", "mla"], 2, tmp_path, extras=("heads",))
    assert (tmp_path / "heads.json").stat().st_mtime_ns == before, "what is fresh stays"


@pytest.fixture
def recall(monkeypatch):
    """A task, of the smallest kind, and a short exam."""
    monkeypatch.setattr(exam, "SEQUENCES", 16)
    return RunConfig(
        name="mqar",
        model=ModelConfig(vocab_size=8, context=32, n_layers=2, d_model=16, n_heads=2),
        data=DataConfig(source="task:mqar"),
        train=TrainConfig(
            steps=20, batch_size=2, precision="fp32", device="cpu", warmup=2, log_every=1, eval_every=20, eval_batches=2
        ),
    )


def asked(found):
    return {(t["task"], c["mechanism"], c["seed"]): c["lengths"] for t in found["tasks"] for c in t["cells"]}


def test_tasks_are_trained_and_examined_with_the_same_seeds(recall, tmp_path):
    needle = replace(brief(recall), name="needle", data=DataConfig(source="task:needle"), seed=5)
    found = compare(needle, ["mha", "sliding"], 2, tmp_path, tasks=[brief(recall), needle], extras=())
    assert found == read_json(tmp_path / "compare.json")
    assert len(found["cells"]) == 4 and len(list((tmp_path / "runs").iterdir())) == 8
    assert [task["task"] for task in found["tasks"]] == ["needle", "mqar"]
    for task in found["tasks"]:
        assert [(c["mechanism"], c["seed"]) for c in task["cells"]] == [
            (label, seed) for seed in (5, 6) for label in ("mha", "sliding")
        ]
        for cell in task["cells"]:
            assert cell["status"] == "done" and cell["context"] == 32 and cell["steps"] == 4
            points = {point["length"]: point for point in cell["lengths"]}
            assert list(points) == [8, 16, 32, 64, 128]
            assert cell["accuracy"] == points[32]["accuracy"] and 0 <= cell["accuracy"] <= 1
            slots = [min(n, 32) if cell["mechanism"] == "sliding" else n for n in points]
            assert [point["cache_bytes"] for point in points.values()] == [4 * 2 * 2 * 16 * n for n in slots]
            assert bool(cell["depths"]) == (task["task"] == "needle")
        rows = {row["mechanism"]: row for row in task["summary"]}
        own = {(c["mechanism"], c["seed"]): c["accuracy"] for c in task["cells"]}
        gaps = [own["sliding", seed] - own["mha", seed] for seed in (5, 6)]
        assert rows["sliding"]["difference"] == pytest.approx(sum(gaps) / 2, abs=1e-12)
        assert rows["mha"]["accuracy"] == pytest.approx((own["mha", 5] + own["mha", 6]) / 2)
        low, high = rows["sliding"]["interval"]
        assert low <= rows["sliding"]["difference"] <= high
    view = shown(found)
    assert max(map(len, view.splitlines())) <= 80 and "…" not in view
    (chance,) = (line.split() for line in view.splitlines() if line.startswith("chance"))
    assert chance == ["chance", "3.8", "3.8"]


def test_a_preset_that_is_a_task_is_examined_itself(recall, tmp_path):
    found = compare(brief(recall), ["mha"], 1, tmp_path, tasks=[brief(recall)], extras=("samples", "attention"))
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert list(asked(found)) == [("mqar", "mha", 0)]
    (sample,) = read_json(tmp_path / "samples.json")
    assert len(sample["prompt"]) == 8


def test_tasks_go_on_where_they_were_interrupted(preset, recall, tmp_path, monkeypatch):
    run = functools.partial(compare, brief(preset), ["mha", "mqa"], 1, tasks=[recall], extras=())
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match=r"stopped; 2 of 4 runs"):
        patched.setattr(Progress, "update", interrupt_at(9))
        run(tmp_path / "parts")
    (task,) = read_json(tmp_path / "parts" / "compare.json")["tasks"]
    assert [(c["status"], c["accuracy"]) for c in task["cells"]] == [("interrupted", None)]
    assert task["summary"][0]["n"] == 0
    trained = []
    monkeypatch.setattr(
        grid, "train", lambda config, *args, **kw: trained.append(config.name) or train(config, *args, **kw)
    )
    found = run(tmp_path / "parts")
    assert trained == ["mha", "mqa"] and asked(found) == asked(whole)
    assert run(tmp_path / "parts")["tasks"] == found["tasks"] and len(trained) == 2


def test_an_exam_that_fails_is_told_and_taken_again(preset, recall, tmp_path, monkeypatch):
    honest = grid.examine

    def broken(folder):
        if "mqa-" in str(folder):
            raise RuntimeError("the dog ate it")
        return honest(folder)

    run = functools.partial(compare, brief(preset), ["mha", "mqa"], 1, tmp_path, tasks=[brief(recall)], extras=())
    with monkeypatch.context() as patched:
        patched.setattr(grid, "examine", broken)
        found = run()
    mha, mqa = found["tasks"][0]["cells"]
    assert mha["status"] == "done" and mqa["status"] == "failed" and mqa["error"].startswith("RuntimeError: the dog")
    assert mqa["accuracy"] is None and "mqa s5 mqar failed: RuntimeError: the dog ate it" in shown(found)
    assert [cell["status"] for cell in run()["tasks"][0]["cells"]] == ["done", "done"]


def test_widths_are_solved_for_tasks_too(preset, recall, tmp_path):
    preset, recall = (replace(brief(p, 1), model=replace(p.model, d_model=32, n_heads=4)) for p in (preset, recall))
    found = compare(preset, ["mha", "mqa"], 1, tmp_path, "params", tasks=[recall], extras=())
    mha, mqa = found["tasks"][0]["cells"]
    assert abs(mqa["parameters"] / mha["parameters"] - 1) <= 0.01
    change = found["tasks"][0]["matched"]["mqa"]
    assert change["parameters"] == mqa["parameters"] and f"mqa: {change['text']} (mqar)" in shown(found)


def test_more_accuracy_is_better(recall, tmp_path, monkeypatch):
    work = grid.grid(Comparison(recall, ["mha", "mqa", "gqa"], 3), tmp_path)
    known = {c.folder: RunResult(name="t", mechanism=c.label, seed=c.seed, key="k") for c in work.cells}
    share = {"mha": (0.5, 0.6, 0.7), "mqa": (0.61, 0.7, 0.8), "gqa": (0.5, 0.7, 0.6)}

    def answers(cell, result):
        about = {"task": "mqar", "mechanism": cell.label, "seed": cell.seed, "key": "k"}
        return TaskResult(**about, accuracy=share[cell.label][cell.seed])

    monkeypatch.setattr(Cell, "answers", answers)
    rows = {row["mechanism"]: row for row in summarize_task(work, known)["summary"]}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "mha": "baseline", "mqa": "better", "gqa": "undecided",
    }  # fmt: skip
    half = 6.16441 * (1 / 30000) ** 0.5 / 3**0.5  # of 0.11, 0.10 and 0.10; two intervals together
    assert rows["mqa"]["pairwise"] == pytest.approx([0.31 / 3 - half, 0.31 / 3 + half], abs=1e-5)
    assert rows["mqa"]["interval"] == rows["mqa"]["pairwise"] and rows["mqa"]["by"] == "pairwise", "gqa spreads more"
    assert sum(rows["mqa"]["pooled"]) / 2 == pytest.approx(0.31 / 3)
    assert rows["mqa"]["accuracy"] == pytest.approx(2.11 / 3)


def test_sizes_are_compared_each_by_itself(preset, tmp_path, monkeypatch):
    preset = replace(brief(preset), model=replace(preset.model, d_model=32, n_heads=4))
    sizes = ["2x32", "1x16", "1x24x2"]
    found = compare(preset, ["mha", "mqa"], 2, tmp_path, "params", sizes=sizes, extras=("samples",))
    assert found == read_json(tmp_path / "compare.json")
    shapes = [(s["size"], s["n_layers"], s["d_model"], s["n_heads"]) for s in found["sizes"]]
    assert shapes == [("1x16", 1, 16, 2), ("1x24x2", 1, 24, 2), ("2x32", 2, 32, 4)], "by parameters"
    assert len(list((tmp_path / "runs").iterdir())) == 3 * 2 * 2
    last = found["sizes"][-1]
    assert found["size"] == "2x32" and all(found[name] == last[name] for name in ("cells", "summary", "matched"))
    for each in found["sizes"]:
        own = {(c["mechanism"], c["seed"]): c for c in each["cells"]}
        assert len(own) == 4 and {c["status"] for c in own.values()} == {"done"}
        assert own["mqa", 5]["parameters"] == pytest.approx(own["mha", 5]["parameters"], rel=0.01)
        gaps = [own["mqa", seed]["val_loss"] - own["mha", seed]["val_loss"] for seed in (5, 6)]
        assert each["summary"][1]["difference"] == pytest.approx(sum(gaps) / 2, abs=1e-12)
    assert [s["mechanism"] for s in read_json(tmp_path / "samples.json")] == ["mha", "mqa"]
    view = shown(found)
    assert max(map(len, view.splitlines())) <= 80 and "…" not in view and "The largest size, 2x32." in view
    (row,) = (line.split() for line in view.splitlines() if line.startswith("mha") and line.count(".") == 3)
    assert row[1:] == [f"{s['summary'][0]['val_loss']:.4f}" for s in found["sizes"]]
    monkeypatch.setattr(grid, "train", None)
    fewer = compare(preset, ["mha", "mqa"], 2, tmp_path, "params", sizes=["2x32"], extras=())
    assert fewer["cells"] == found["cells"], "what is there counts"


def test_a_failure_at_one_size_is_told_with_it(preset, tmp_path, monkeypatch):
    def broken(config, *args, **kwargs):
        if config.mechanism == "mqa" and config.model.d_model == 8:
            raise UserError("too small")
        return train(config, *args, **kwargs)

    monkeypatch.setattr(grid, "train", broken)
    found = compare(brief(preset), ["mha", "mqa"], 1, tmp_path, sizes=["1x8", "1x16"], extras=())
    assert "mqa s5 1x8 failed: too small" in shown(found)
    assert [row["verdict"] for row in found["sizes"][0]["summary"]] == ["baseline", "too few seeds"]


def test_a_size_keeps_the_size_of_heads(preset):
    wide = replace(preset, model=replace(preset.model, d_model=48, n_heads=3, ff_dim=100))
    model = sized(wide, "5x96").model
    assert (model.n_layers, model.d_model, model.n_heads, model.head_dim, model.ff_dim) == (5, 96, 6, None, 200)
    given = replace(preset, model=replace(preset.model, d_model=48, n_heads=3, head_dim=8))
    model = sized(given, "5x96").model
    assert (model.n_heads, model.head_dim) == (12, 8)
    assert sized(wide, "1x96x4").model.n_heads == 4
    for size, what in (
        ("96", "LAYERSxWIDTH"),
        ("0x96", "LAYERSxWIDTH"),
        ("2x", "LAYERSxWIDTH"),
        ("2x3x4x5", "LAYERSx"),
    ):
        with pytest.raises(UserError, match=f"the size '{size}' is not {what}"):
            sized(wide, size)
    with pytest.raises(UserError, match=r"2x40 is 40 wide, which heads of 16 do not fill.*2x40x2"):
        sized(wide, "2x40")


def test_a_task_at_several_sizes_is_several_columns(recall, tmp_path):
    found = compare(brief(recall), ["mha"], 1, tmp_path, sizes=["1x8", "2x16"], extras=())
    assert [task["task"] for task in found["tasks"]] == ["mqar 1x8", "mqar 2x16"]
    assert [task["cells"][0]["parameters"] for task in found["tasks"]] == [
        size["cells"][0]["parameters"] for size in found["sizes"]
    ]


SCRIPT = """
from dataclasses import replace
from attnlab import presets
from attnlab.comparison.compare import compare
from attnlab.comparison.engines import Share
from attnlab.comparison.grid import Comparison
quick = presets.get("quick")
model = replace(quick.model, n_layers=1, d_model=16, n_heads=2, context=16)
train = replace(quick.train, steps=2, batch_size=2, eval_every=2, eval_batches=1, device="cpu")
found = compare(Comparison(replace(quick, model=model, train=train), ["mha"], 2), "out", share=Share(jobs=2))
print("trained", [cell["status"] for cell in found["cells"]])
"""


def test_a_script_that_does_not_say_main_compares_too(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.splitlines() == ["trained ['done', 'done']"], done.stderr
