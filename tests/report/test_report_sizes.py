"""Sizes in the report: the figures show what the file holds, and the words no more than the intervals."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("plotly")

import browser as chromium
import report_fixture as fixture

from attnlab.contrasts import verdict_in_words
from attnlab.report import render, style, write_report
from attnlab.report.results_folder import read_results
from attnlab.report.sections import sizes

NAMES = ("mha", "mla", "sliding")
SHAPES = {"2x64": 0.25, "4x128": 1.0, "6x256": 6.0}  # and parameters, relative to the fixture's
ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&<b>"
READY = "document.documentElement.dataset.ready === 'yes'"


def with_sizes(folder: Path, failed: tuple[str, int] | None = ("sliding", 1)) -> Path:
    """The fixture's comparison as the largest of three sizes; a run of the smallest failed."""
    made = fixture.make(folder, layers=1, seeds=(0, 1, 2), mechanisms=NAMES, failed=None)
    data = json.loads((made / "compare.json").read_text())
    rng = random.Random(5)
    data["sizes"] = []
    for name, factor in SHAPES.items():
        cells = [fixture.run(m, seed, rng, luck=0.01 * seed) for seed in (0, 1, 2) for m in NAMES]
        grown = [
            type(c).from_dict(
                c.to_dict() | {"parameters": round(c.parameters * factor), "val_loss": c.val_loss - 0.1 * factor**0.5}
            )
            for c in cells
        ]
        if name == "2x64" and failed:
            lost = next(i for i, c in enumerate(grown) if (c.mechanism, c.seed) == failed)
            about = {"status": "failed", "val_loss": None, "error": "the node went away", "attempts": 2}
            grown[lost] = type(grown[lost]).from_dict(grown[lost].to_dict() | about)
        judged = fixture.summary(grown, list(NAMES), "mha")
        layers, width = map(int, name.split("x"))
        shape = {"size": name, "n_layers": layers, "d_model": width, "n_heads": width // 16, "matched": {}}
        data["sizes"].append(shape | {"cells": [c.to_dict() for c in grown]} | judged)
    data |= {"size": "6x256", **{name: data["sizes"][-1][name] for name in ("cells", "summary", "statistics")}}
    (made / "compare.json").write_text(json.dumps(data))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_sizes(tmp_path_factory.mktemp("sizes") / "sweep")


def test_figures_show_what_the_file_holds(folder: Path) -> None:
    found = read_results(folder)
    validation, difference = sizes.against_parameters(found, style.looks(found.mechanisms))
    held = json.loads((folder / "compare.json").read_text())["sizes"]
    rows = [{row["mechanism"]: row for row in each["summary"]} for each in held]
    lines = {trace["name"]: trace for trace in validation.figure["data"]}
    assert list(lines) == list(NAMES)
    for mechanism, line in lines.items():
        assert line["y"] == pytest.approx([each[mechanism]["val_loss"] for each in rows])
        assert line["x"] == [
            pytest.approx(next(c["parameters"] for c in each["cells"] if c["mechanism"] == mechanism)) for each in held
        ]
        for number, each in enumerate(held):
            own = [c["val_loss"] for c in each["cells"] if c["mechanism"] == mechanism and c["status"] == "done"]
            assert line["y"][number] + line["error_y"]["array"][number] == pytest.approx(max(own))
    gaps = {trace["name"]: trace for trace in difference.figure["data"]}
    assert list(gaps) == ["mla", "sliding"]
    for mechanism, line in gaps.items():
        assert line["y"] == pytest.approx([each[mechanism]["difference"] for each in rows])
        bars = zip(line["y"], line["error_y"]["arrayminus"], line["error_y"]["array"], strict=True)
        ends = [(middle - down, middle + up) for middle, down, up in bars]
        assert ends == [pytest.approx(each[mechanism]["interval"]) for each in rows]
    for view in (validation, difference):
        axes = view.figure["layout"]
        assert "parameters (log scale)" in axes["xaxis"]["title"]["text"] and axes["xaxis"]["type"] == "log"
        assert "nats per token" in axes["yaxis"]["title"]["text"] and view.caption.endswith(".")
        assert [text.split("<br>")[1] for text in axes["xaxis"]["ticktext"]] == list(SHAPES)


def test_the_words_say_which_size_they_are_about(folder: Path) -> None:
    page = re.sub(r"<[^>]+>", " ", render(folder))
    assert "All of this is about the largest size, 6x256; see Sizes for the others." in page
    part = re.sub(r"<[^>]+>", " ", render(folder).split('<section id="sizes"')[1].split("</section>")[0])
    row = {r["mechanism"]: r for r in json.loads((folder / "compare.json").read_text())["sizes"][0]["summary"]}["mla"]
    low, high = (f"{end:+.4f}".replace("-", "−") for end in row["interval"])
    difference = f"{row['difference']:+.4f}".replace("-", "−")
    assert re.search(
        rf"{verdict_in_words(row['verdict'], 0.01)}\s+{re.escape(f'{difference} ({low} to {high})')}", part
    )
    assert re.search(r"sliding, seed 1, 2x64\s+failed after 2 attempts: the node went away", part)


def test_one_size_has_no_section(tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "plain", layers=1, seeds=(0,), mechanisms=("mha",), failed=None)
    page = render(made)
    assert 'id="sizes"' not in page and "largest size" not in page


def test_a_size_without_a_finished_run_says_so(tmp_path: Path) -> None:
    made = with_sizes(tmp_path / "r", failed=None)
    data = json.loads((made / "compare.json").read_text())
    data["sizes"][0]["cells"] = []
    for row in data["sizes"][0]["summary"]:
        row.update(n=0, val_loss=None, difference=None, interval=None, verdict="too few seeds")
    (made / "compare.json").write_text(json.dumps(data))
    assert "no finished run" in render(made)
    for each in data["sizes"]:
        each |= {"cells": data["sizes"][0]["cells"], "summary": data["sizes"][0]["summary"]}
    (made / "compare.json").write_text(json.dumps(data))
    assert 'id="plot-sizes"' not in render(made)


def test_damage_is_named(tmp_path: Path) -> None:
    for number, damage in enumerate((lambda size: size.pop("summary"), lambda size: size.update(cells=[{"seed": 1}]))):
        made = with_sizes(tmp_path / str(number))
        data = json.loads((made / "compare.json").read_text())
        damage(data["sizes"][1])
        (made / "compare.json").write_text(json.dumps(data))
        assert re.search(r"Left out: .*compare\.json(: it lacks| does not hold what this version reads)", render(made))


@pytest.mark.browser
def test_drawn_in_a_browser(browser: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    attacked = with_sizes(tmp_path / "attacked")
    text = (attacked / "compare.json").read_text()
    text = text.replace('"2x64"', json.dumps(ATTACK)).replace("the node went away", json.dumps(ATTACK)[1:-1])
    (attacked / "compare.json").write_text(text)
    for width, made in ((1280, folder), (390, folder), (390, attacked)):
        browser.resize(width, 844, phone=width < 400)
        browser.console.clear()
        browser.open(write_report(made).as_uri(), READY)
        assert browser.run("document.querySelectorAll('#plot-sizes path.js-line').length") == 3
        assert browser.run("[document.documentElement, document.body].every(e => e.scrollWidth <= innerWidth)")
        assert browser.run("window.hacked") is None and browser.console == []
    browser.resize(1280, 900)
    browser.open(write_report(folder).as_uri(), READY)
    browser.click("#sizes .views button", 1)
    browser.wait("document.querySelector('#sizes figcaption').textContent.startsWith('Validation loss minus')")
    assert browser.run("document.querySelectorAll('#plot-sizes path.js-line').length") == 2
