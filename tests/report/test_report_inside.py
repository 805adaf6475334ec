"""The report's look inside the heads, from real trained runs, in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("plotly")

import browser as chromium
import report_fixture as fixture

from attnlab import TrainConfig, presets
from attnlab.comparison.extras import heads_of_run
from attnlab.report import render, write_report
from attnlab.report.sections.heads import shares_within
from attnlab.training.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inside")
    made = fixture.make(out / "quick", layers=1, seeds=(0, 1), mechanisms=("mha", "mla", "mka"), failed=None)
    quick, entries = presets.get("quick"), []
    steps = TrainConfig(steps=6, batch_size=2, warmup=1, eval_every=6, eval_batches=1, save_every=2, keep=0)
    for mechanism in ("mha", "mla", "mka"):
        for seed in (0, 1):
            options = {"mka": {"chunk": 4}} if mechanism == "mka" else {}
            model = replace(
                quick.model, n_layers=2, d_model=16, n_heads=2, context=16, mechanisms=(mechanism,), options=options
            )
            train(replace(quick, seed=seed, model=model, train=steps), out / f"{mechanism}{seed}")
            entries += heads_of_run(mechanism, seed, out / f"{mechanism}{seed}")
    (made / "heads.json").write_text(json.dumps(entries))
    return made


def test_numbers_on_the_page_are_those_of_the_file(folder: Path) -> None:
    entries = json.loads((folder / "heads.json").read_text())
    page = render(folder)
    for mechanism in ("mha", "mla"):
        strongest = [
            max(value for row in e["scores"]["scores"]["induction"] for value in row)
            for e in entries
            if e["mechanism"] == mechanism
        ]
        assert f"{sum(strongest) / 2:.2f} ({min(strongest):.2f} to {max(strongest):.2f})" in page
    assert "Holm" in page and "no curves over training" not in page
    latent = next(e for e in entries if e["mechanism"] == "mla")["inside"][1]
    assert f"{latent['effective_rank']:.1f} of {latent['rank']}" in page


def test_bins_of_distances_become_sharesshares_within_their_far_ends() -> None:
    assert shares_within([[1.0, 0.25], [15.0, 0.25], [16.0, 0.375], [32.0, 0.125]]) == (
        [1, 15, 31, 63],
        [0.25, 0.5, 0.875, 1],
    )


def test_a_folder_without_it_has_no_such_section(tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "plain", layers=1, seeds=(0,), mechanisms=("mha",), failed=None)
    assert "Inside the heads" not in render(made)


def test_without_checkpoints_it_says_why_there_are_no_curves(folder: Path, tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "end", layers=1, seeds=(0,), mechanisms=("mha",), failed=None)
    entries = json.loads((folder / "heads.json").read_text())[:1]
    del entries[0]["emergence"]
    (made / "heads.json").write_text(json.dumps(entries))
    page = render(made)
    assert "no curves over training, because the runs kept no checkpoints" in page and "When: induction" not in page


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "bad", layers=1, seeds=(0,), mechanisms=("mha",), failed=None)
    entries = json.loads((folder / "heads.json").read_text())
    del entries[0]["emergence"]["first_half"][0]
    (made / "heads.json").write_text(json.dumps(entries))
    assert re.search(r"Left out: .*heads\.json does not hold .*curves differ in length", render(made))


@pytest.mark.browser
def test_every_view_draws_in_a_browser(browser: chromium.Browser, folder: Path) -> None:
    page = write_report(folder)
    browser.open(page.as_uri(), ready="document.documentElement.dataset.ready === 'yes'")
    views = browser.run("[...document.querySelectorAll('#inside .views button')].map(b => b.textContent)")
    assert views == [
        "When: induction",
        "When: previous token",
        "When: gain",
        "Where: induction",
        "Where: previous token",
        "Where: copying",
        "Cause",
        "Latents of mla",
        "Rank",
        "Gate of mka",
        "Reach, chunks",
    ]
    for number in range(len(views)):
        browser.run(f"document.querySelectorAll('#inside .views button')[{number}].click()")
        drawn = browser.run("document.querySelectorAll('#plot-inside .main-svg').length > 0")
        titles = browser.run("[...document.querySelectorAll('#plot-inside .infolayer [class*=title]')].length")
        caption = browser.run("document.querySelector('#inside figcaption').textContent")
        assert drawn and titles and caption, views[number]
    assert not browser.console and not [r for r in browser.requests if r.startswith("http")]
