"""Synthetic tasks in the report: what the figures show is what the file holds, in a real browser too."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

import browser as chromium
import report_fixture as fixture

from attnlab.report import render, style, write_report
from attnlab.report.results_folder import read_results
from attnlab.report.sections import tasks
from attnlab.results import TaskResult

NAMES = ("mha", "sliding", "latent_lookup")
LENGTHS = (16, 32, 64, 128, 256)
ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&<b>"
READY = "document.documentElement.dataset.ready === 'yes'"


def result(task: str, mechanism: str, seed: int) -> TaskResult:
    """mha knows all it was trained for, sliding what is near, latent_lookup nothing."""
    best = {"mha": 0.98, "sliding": 0.6, "latent_lookup": 1 / 26}[mechanism]
    share = {n: round(best if n <= 64 else best / 2, 4) - seed / 100 * (best > 0.1) for n in LENGTHS}
    held = {"mha": 256, "sliding": 256, "latent_lookup": 0}[mechanism]
    lengths = [
        {
            "length": n,
            "accuracy": share[n],
            "exact": share[n] / 2,
            "cache_bytes": 4 * held * (min(n, 32) if mechanism == "sliding" else n),
        }
        for n in LENGTHS
    ]
    depths = [[n, (d + 0.5) / 4, share[n] * (d + 1) / 4] for n in LENGTHS for d in range(4)] if task == "needle" else []
    return TaskResult(
        task=task, mechanism=mechanism, seed=seed, key="k", context=64, steps=2000, chance=1 / 26, accuracy=share[64],
        exact=share[64] / 2, sequences=512, lengths=lengths, depths=depths,
    )  # fmt: skip


def trial(task: str) -> dict[str, Any]:
    cells = [result(task, m, seed).to_dict() for seed in (0, 1, 2) for m in NAMES]
    lost = {"status": "failed", "error": "the loss became nan", "accuracy": None, "lengths": [], "depths": []}
    cells[-1] |= lost
    rows = [
        {"mechanism": "mha", "n": 3, "accuracy": 0.97, "difference": None, "interval": None, "verdict": "baseline"},
        {"mechanism": "sliding", "n": 3, "accuracy": 0.59, "difference": -0.38, "interval": [-0.4, -0.36]}
        | {"verdict": "worse"},
        {"mechanism": "latent_lookup", "n": 2, "accuracy": 0.0385, "difference": -0.9315, "interval": [-1.0, -0.8]}
        | {"verdict": "worse"},
    ]
    about = {
        "task": task,
        "tests": f"What {task} asks.",
        "chance": 1 / 26,
        "context": 64,
        "matched": {"sliding": {"text": "ff_dim 256 -> 264"}},
    }
    return about | {"cells": cells, "summary": rows}


def with_tasks(folder: Path, *names: str) -> Path:
    made = fixture.make(folder, layers=1, seeds=(0, 1), mechanisms=("mha", "sliding"), failed=None)
    data = json.loads((made / "compare.json").read_text())
    data["tasks"] = [trial(name) for name in names]
    (made / "compare.json").write_text(json.dumps(data))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tasks(tmp_path_factory.mktemp("tasks") / "quick", "mqar", "needle")


def test_figures_show_what_the_file_holds(folder: Path) -> None:
    found = read_results(folder)
    looks = style.looks(found.mechanisms)
    by_length, by_cache, by_depth = tasks.against_length(found, looks), tasks.against_cache(found, looks), None
    assert [view.name for view in by_length] == [view.name for view in by_cache] == ["mqar", "needle"]
    lines = {trace["name"]: trace for trace in by_length[0].figure["data"]}
    assert set(lines) == set(NAMES) and lines["mha"]["x"] == list(LENGTHS)
    assert lines["mha"]["y"] == pytest.approx([97, 97, 97, 48, 48])
    assert lines["mha"]["error_y"]["array"] == pytest.approx([1] * 5)
    chance = by_length[0].figure["layout"]["shapes"][1]
    assert chance["y0"] == chance["y1"] == pytest.approx(100 / 26) and "64 tokens" in by_length[0].caption
    lines = {trace["name"]: trace for trace in by_cache[0].figure["data"]}
    assert lines["mha"]["x"] == [1024 * n for n in LENGTHS]
    assert lines["sliding"]["x"] == [1024 * min(n, 32) for n in LENGTHS]
    assert "latent_lookup" not in lines and "latent_lookup keeps no cache" in by_cache[0].caption
    by_depth = tasks.depth_maps(found)
    assert [view.name for view in by_depth] == list(NAMES)
    heat = by_depth[0].figure["data"][0]
    assert heat["x"] == ["16", "32", "64", "128", "256"] and heat["y"] == ["12", "38", "62", "88"]
    assert heat["z"][3] == pytest.approx([97, 97, 97, 48, 48]) and heat["z"][0][0] == pytest.approx(97 / 4)
    for view in (*by_length, *by_cache, *by_depth):
        x, y = (view.figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        assert re.search(r"\((tokens|log scale|%)", x) and "%" in y and view.caption.endswith(".")


def test_the_table_says_no_more_than_the_intervals(folder: Path) -> None:
    page = re.sub(r"<[^>]+>", " ", render(folder).split('id="tasks"')[1].split("</section>")[0])
    assert re.search(r"sliding\s+59.0 %\s+whole sequences 29.5 %\s+▼ worse −38.0 \(−40.0 to −36.0\)", page)
    assert "chance" in page and "3.8 %" in page
    assert "Widths solved for sliding in mqar (ff_dim 256 -&gt; 264) and sliding in needle" in page
    assert "latent_lookup, seed 2, mqar" in page and "the loss became nan" in page


def test_colours_of_the_heat_map_differ_in_brightness() -> None:
    """So that they can be told apart without seeing colour."""
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (bytes.fromhex(c[1:]) for c in tasks.BLUES)]
    assert grey == sorted(grey, reverse=True) and min(a - b for a, b in pairwise(grey)) > 40


def test_no_tasks_no_section(tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "plain", layers=1, seeds=(0,), mechanisms=("mha",), failed=None)
    assert "Synthetic tasks" not in render(made)


def test_a_task_without_a_finished_run_says_so(tmp_path: Path) -> None:
    made = with_tasks(tmp_path / "r", "mqar")
    data = json.loads((made / "compare.json").read_text())
    for cell in data["tasks"][0]["cells"]:
        cell.update(status="interrupted", accuracy=None, lengths=[])
    for row in data["tasks"][0]["summary"]:
        row.update(n=0, accuracy=None, difference=None, interval=None, verdict="too few seeds")
    (made / "compare.json").write_text(json.dumps(data))
    page = render(made)
    assert "no finished run" in page and 'id="plot-tasks"' not in page


def test_damage_is_named(tmp_path: Path) -> None:
    for number, damage in enumerate(
        (
            lambda task: task["cells"][0]["lengths"][0].pop("cache_bytes"),
            lambda task: task.pop("chance"),
            lambda task: task["cells"][0].update(depths=[[1, 2]]),
        )
    ):
        made = with_tasks(tmp_path / str(number), "needle")
        data = json.loads((made / "compare.json").read_text())
        damage(data["tasks"][0])
        (made / "compare.json").write_text(json.dumps(data))
        assert re.search(r"Left out: .*compare\.json(: it lacks| does not hold what this version reads)", render(made))


@pytest.mark.browser
def test_drawn_in_a_browser(browser: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    attacked = with_tasks(tmp_path / "attacked", "needle")
    text = (attacked / "compare.json").read_text()
    text = text.replace('"latent_lookup"', json.dumps(ATTACK)).replace("What needle", json.dumps(ATTACK)[1:-1])
    (attacked / "compare.json").write_text(text.replace("became nan", json.dumps(ATTACK)[1:-1]))
    marks = "p.querySelectorAll('path.js-line, .point, .heatmaplayer image').length"
    for width, made in ((1280, folder), (390, folder), (390, attacked)):
        browser.resize(width, 844, phone=width < 400)
        browser.console.clear()
        browser.open(write_report(made).as_uri(), READY)
        drawn = browser.run(f"[...document.querySelectorAll('#tasks .plot')].map(p => [p.id, {marks} > 0])")
        assert drawn == [["plot-tasks", True], ["plot-memory", True], ["plot-depth", True]]
        assert browser.run("[document.documentElement, document.body].every(e => e.scrollWidth <= innerWidth)")
        assert browser.run("window.hacked") is None and browser.console == []
    browser.resize(1280, 900)
    browser.prefer("dark")
    browser.open(write_report(folder).as_uri(), READY)
    browser.click("#tasks figure:has(#plot-tasks) .views button", 1)
    browser.wait("document.querySelector('#tasks figcaption').textContent.startsWith('What needle asks.')")
    shown = "document.getElementById('plot-tasks').data.filter(t => t.visible && t.meta === 'mha').length"
    browser.click("#tasks figure:has(#plot-tasks) .legend button", 0)
    browser.wait(f"{shown} === 0")
    browser.prefer("light")
