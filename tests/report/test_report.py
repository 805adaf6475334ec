"""The report: honest words, whole files, and a page that works in a real browser without a network."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

import browser as chromium
import report_fixture as fixture

from attnlab import attention
from attnlab.errors import UserError
from attnlab.formatting import count, size
from attnlab.report import render, style, write_report
from attnlab.report.headline import headline
from attnlab.report.results_folder import Findings, Standing, read_results
from attnlab.report.sections.curves import curve_views
from attnlab.report.sections.decoding import crossings, decoding_views
from attnlab.report.sections.trade import Point, front, trade_views
from attnlab.results import BenchRecord, RunResult

FILES = ("compare.json", "laws.json", "bench.json", "samples.json", "attention.json")
ATTACK = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&<b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.make(tmp_path_factory.mktemp("report") / "quick", layers=2)


class Tags(HTMLParser):
    """Every element with its attributes, and all text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.text += data


# Words


def findings(**losses: tuple[float | None, tuple[float, float] | None, str]) -> Findings:
    """Standings as (difference, interval, verdict) against an mha of loss 2, each with two finished runs."""
    caches = {"mha": 1000, "mla": 250, "latent": 0}
    names = ["mha", *losses]
    cells = [
        RunResult(name="t", mechanism=m, seed=s, key="k", val_loss=2.0, cache_bytes=caches.get(m, 1000))
        for m in names
        for s in (0, 1)
    ]
    standings = [Standing("mha", 2, 2.0, None, None, "baseline")]
    standings += [
        Standing(m, 2, 2.0 + (d or 0.0), d, interval, verdict) for m, (d, interval, verdict) in losses.items()
    ]
    return Findings(folder="t", cells=cells, standings=standings, compare={"mechanisms": names, "baseline": "mha"})


UNDECIDED, EQUAL, BETTER, WORSE = "undecided", "equal", "better", "worse"


@pytest.mark.parametrize(
    ("found", "title"),
    [
        (findings(mka=(-0.02, (-0.03, -0.01), BETTER)), "mka learns better than mha, by 0.020 nats per token."),
        (
            findings(mla=(-0.01, (-0.02, 0.009), UNDECIDED), mqa=(0.1, (0.05, 0.15), WORSE)),
            "mla learns at most 0.01 nats worse than mha, with a 4.0 times smaller cache; nothing learns better for "
            "certain.",
        ),
        (
            findings(latent=(0.0, (-0.009, 0.009), EQUAL)),
            "latent learns as well as mha, within 0.01 nats, with no cache; nothing learns better for certain.",
        ),
        (
            findings(latent=(0.0, (-0.02, 0.02), UNDECIDED), mla=(0.0, (-0.009, 0.009), EQUAL)),
            "mla learns as well as mha, within 0.01 nats, with a 4.0 times smaller cache; nothing learns better for "
            "certain.",
        ),
        (
            findings(latent=(-0.01, (-0.02, 0.01), UNDECIDED)),  # touches the margin
            "2 seeds do not decide whether any mechanism learns better or worse than mha.",
        ),
        (
            findings(gqa=(-0.01, (-0.02, 0.005), UNDECIDED)),
            "2 seeds do not decide whether any mechanism learns better or worse than mha.",
        ),
        (findings(gqa=(0.0, (-0.005, 0.005), EQUAL)), "gqa learns as well as mha, within 0.01 nats."),
        (
            findings(gqa=(0.0, (-0.05, 0.05), UNDECIDED), mqa=(0.1, (0.05, 0.15), WORSE)),
            "mqa learns worse than mha; nothing learns better for certain.",
        ),
        (findings(mqa=(0.1, (0.05, 0.15), WORSE)), "mqa learns worse than mha; nothing learns better."),
        (Findings(folder="t", laws=fixture.laws(["mha"])), "No finished training run in this folder yet."),
        (
            Findings(folder="t", laws=fixture.laws(["latent_lookup"])),
            "latent_lookup breaks laws; no finished training run here.",
        ),
    ],
)
def test_headline_says_what_was_found_and_no_more(found: Findings, title: str) -> None:
    assert headline(found)[0] == title


def test_headline_names_a_difference_in_parameters() -> None:
    sizes = {"mha": 1000, "mlp_latent": 1400, "mla": 985, "gqa": 990, "mqa": 850}
    found = findings(
        mlp_latent=(-0.02, (-0.03, -0.01), BETTER),
        gqa=(-0.01, (-0.02, -0.005), BETTER),
        mla=(0.0, (-0.009, 0.009), EQUAL),
        mqa=(0.1, (0.05, 0.15), WORSE),
    )
    found = replace(found, cells=[replace(cell, parameters=sizes[cell.mechanism]) for cell in found.cells])
    title, details = headline(found)
    assert title == "mlp_latent (40 % more parameters) and gqa learn better than mha."
    said = " ".join(details)
    assert (
        "mla (1.5 % fewer parameters) learns as well as mha, within 0.01 nats, with a 4.0 times smaller cache." in said
        and "mqa (15 % fewer parameters) learns" in said
    )


def test_a_lower_loss_that_is_undecided_is_never_called_better() -> None:
    title, details = headline(findings(gqa=(-0.5, (-1.2, 0.2), UNDECIDED), mqa=(-0.1, (-0.3, 0.1), UNDECIDED)))
    said = " ".join([title, *details])
    assert not re.search(r"better|lower|beaten|wins", said.replace("better or worse", "").replace("neither better", ""))
    assert "gqa and mqa are undecided: neither better nor worse than mha, nor equal within 0.01 nats." in said
    assert "does not mean equal" in said and "±0.450 nats" in said


def test_a_mechanism_that_breaks_laws_is_not_praised_for_its_cache() -> None:
    found = findings(latent=(0.0, (-0.009, 0.009), EQUAL), mla=(0.0, (-0.009, 0.009), EQUAL))
    broken = [replace(law, mechanism="latent") for law in fixture.laws(["latent_lookup"])]
    assert headline(found)[0].startswith("latent learns as well as mha, within 0.01 nats, with no cache;")
    title = headline(replace(found, laws=broken))[0]
    assert title.startswith("mla learns as well as mha, within 0.01 nats, with a 4.0 times smaller cache;")


def test_the_headline_says_how_it_was_judged(folder: Path) -> None:
    found = read_results(folder)
    said = headline(found)[1][-1]
    assert found.statistics["why"] in said
    if any(standing.verdict == "undecided" for standing in found.standings):
        assert f"To see 0.01 nats you need about {found.statistics['seeds_needed']:,} seeds." in said


def test_the_smallest_cache_among_the_undecided_is_not_elected() -> None:
    """The widest interval holds 0 most easily, so that rewards noise."""
    found = findings(latent=(0.0, (-0.17, 0.17), UNDECIDED), mla=(0.02, (-0.01, 0.05), UNDECIDED))
    said = " ".join([headline(found)[0], *headline(found)[1]])
    assert "cache" not in said
    better = findings(gqa=(-0.03, (-0.05, -0.01), BETTER), latent=(0.0, (-0.17, 0.17), UNDECIDED))
    assert "cache" not in " ".join(headline(better)[1])
    able = findings(gqa=(-0.03, (-0.05, -0.01), BETTER), mla=(0.0, (-0.009, 0.009), EQUAL))
    assert "mla learns as well as mha, within 0.01 nats, with a 4.0 times smaller cache." in headline(able)[1][0]


def test_the_margin_is_that_of_the_comparison() -> None:
    found = findings(mla=(0.01, (-0.02, 0.04), EQUAL))
    found = replace(found, compare=found.compare | {"statistics": {"margin": 0.05}})
    assert headline(found)[0].startswith("mla learns as well as mha, within 0.05 nats, with a 4.0 times smaller")


def rewritten(folder: Path, out: Path, change: Any) -> Path:
    data = json.loads((folder / "compare.json").read_text())
    change(data)
    out.mkdir()
    (out / "compare.json").write_text(json.dumps(data))
    return out


def test_a_file_of_an_earlier_version_is_judged_by_its_intervals(folder: Path, tmp_path: Path) -> None:
    def age(data: dict[str, Any]) -> None:
        del data["statistics"]
        ends = {"mla": [-0.005, 0.005], "mqa": [-0.02, 0.005], "gqa": [0.01, 0.02], "mka": None}
        for row in data["summary"]:
            if row["mechanism"] in ends:
                interval = ends[row["mechanism"]]
                row |= {"interval": interval, "verdict": "not distinguishable" if interval else "too few seeds"}

    old = rewritten(folder, tmp_path / "old", age)
    found = read_results(old)
    words = {standing.mechanism: standing.verdict for standing in found.standings}
    assert [words[name] for name in ("mha", "mla", "mqa", "gqa", "mka")] == [
        "baseline", "equal", "undecided", "worse", "too few seeds",
    ]  # fmt: skip
    text = Tags(render(old)).text
    assert "not distinguishable" not in text and "An earlier version made these intervals" in text


def test_the_report_can_judge_anew(folder: Path) -> None:
    kept = read_results(folder)
    wide = read_results(folder, intervals="pairwise")
    assert {s.by for s in wide.standings} == {None, "pairwise"} and wide.statistics["intervals"] == "pairwise"
    for before, after in zip(kept.standings, wide.standings, strict=True):
        assert (before.mechanism, before.difference, before.n) == (after.mechanism, after.difference, after.n)
    easy = read_results(folder, margin=5.0)
    assert {s.verdict for s in easy.standings} == {"baseline", "equal"} and easy.margin == 5.0
    assert "equal within 5" in Tags(render(folder, margin=5.0)).text
    with pytest.raises(UserError, match="margin is 0"):
        render(folder, margin=0)


def test_one_seed_is_too_few(tmp_path: Path) -> None:
    found = read_results(fixture.make(tmp_path / "one", seeds=(3,), failed=None, layers=1))
    title, details = headline(found)
    assert title.startswith("One seed each: too few to tell any mechanism from mha")
    assert not re.search(r"\b(better|worse)\b", " ".join([title, *details]))
    page = Tags(render(tmp_path / "one")).text
    assert "one seed per mechanism, so no band" in page.replace("\n", " ")
    assert "too few seeds" in page


def test_failed_runs_are_marked_and_counted_nowhere(folder: Path) -> None:
    page = Tags(render(folder)).text
    assert "1 of 24 runs did not finish and count nowhere: msla with seed 2 (failed)" in page
    assert "2 of 3" in page and "✗ 1 failed" in page
    assert "the loss is NaN at step 431" in page
    found = read_results(folder)
    assert [cell.seed for cell in found.done("msla")] == [0, 1]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (288, "288"),
        (999.6, "1.00 k"),
        (1024, "1.02 k"),
        (24_100, "24.1 k"),
        (410_000, "410 k"),
        (1.77e6, "1.77 M"),
    ],
)
def test_counts(value: float, written: str) -> None:
    assert count(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (294_912, "288 KiB"),
        (1_081_344, "1.03 MiB"),
        (5 << 30, "5.00 GiB"),
    ],
)
def test_sizes(value: float, written: str) -> None:
    assert size(value) == written


@pytest.mark.parametrize("swatch", ["blue", (1, 2), (99, 0, 0), (0, -1, 0), ("1", 2, 3), 7])
def test_a_look_that_does_not_exist_is_none(swatch, monkeypatch):
    """Another package's Config may declare anything; the page takes what is free."""
    monkeypatch.setattr(style, "declared", lambda name, variable: swatch)
    assert style.looks(["theirs"])["theirs"].marker in style.MARKERS


def test_every_mechanism_has_a_look_of_its_own_that_does_not_depend_on_the_others() -> None:
    known = [name for name in attention.names() if attention.declared(name, "swatch")]
    names = [*known, *(f"theirs{i}" for i in range(12))]
    looks = style.looks(names)
    assert set(fixture.MECHANISMS) <= set(known)
    assert len({(x.slot, x.marker, x.dash) for x in looks.values()}) == len(names)
    alone = style.looks(["mla", "theirs0"])
    assert alone["mla"] == looks["mla"] and alone["theirs0"].slot != alone["mla"].slot
    assert {x.marker for x in looks.values()} <= set(style.GLYPHS)
    drawn = [x for name, x in looks.items() if name in fixture.MECHANISMS]
    assert len({x.slot for x in drawn}) == len({x.marker for x in drawn}) == len(drawn)


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_both_themes(folder: Path) -> None:
    style = render(folder).split("<style>")[1].split("</style>")[0]
    themes = [
        dict(re.findall(r"--([\w-]+): ?(#\w{6})", block))
        for block in re.findall(r":root[^{]*\{([^}]*--bad[^}]*)\}", style)
    ]
    assert len(themes) == 3
    for theme in themes:
        for name in ("ink", "muted", "link", "bad", "good"):
            for ground in ("ground", "soft"):
                light, dim = sorted([luminance(theme[name]), luminance(theme[ground])], reverse=True)
                assert (light + 0.05) / (dim + 0.05) >= 4.5, (name, ground, theme)


# Figures


@pytest.mark.parametrize("smaller", [True, False])
def test_front_is_what_no_other_point_beats(smaller: bool) -> None:
    rng = random.Random(5)
    sign = 1 if smaller else -1
    for _ in range(50):
        placed = [Point(str(i), rng.randint(1, 9), rng.randint(1, 9), 0, 0) for i in range(rng.randint(1, 12))]
        kept = front(placed, smaller=smaller)
        assert kept == sorted(kept, key=lambda p: p.x)

        def beats(a: Point, b: Point) -> bool:
            return sign * a.x <= sign * b.x and a.loss <= b.loss and (a.x, a.loss) != (b.x, b.loss)

        expected = {(p.x, p.loss) for p in placed if not any(beats(q, p) for q in placed)}
        assert {(p.x, p.loss) for p in kept} == expected


def decode(mode: str, *ms: float) -> list[BenchRecord]:
    return [BenchRecord(kind="decode", mechanism="mla", mode=mode, context=64 * 4**i, ms=x) for i, x in enumerate(ms)]


@pytest.mark.parametrize(
    ("expanded", "absorbed", "between", "said"),
    [
        ((1, 2, 9), (2, 3, 4), [(256, 1024)], ["absorbed becomes the faster form between 256 and 1,024 tokens"]),
        ((2, 3, 9), (1, 2, 4), [None], ["absorbed form is faster at every context measured"]),
        ((1, 3, 3), (2, 2, 4), [(64, 256), (256, 1024)], ["absorbed becomes", "expanded becomes"]),
        ((1,), (2,), [None], ["expanded form is faster at every"]),
    ],
)
def test_crossover_is_named_between_the_contexts_that_were_measured(
    expanded: tuple[float, ...], absorbed: tuple[float, ...], between: list[Any], said: list[str]
) -> None:
    notes = crossings(Findings(folder="t", bench=[*decode("expanded", *expanded), *decode("absorbed", *absorbed)]))
    assert [note.between for note in notes] == between
    assert all(part in note.sentence for part, note in zip(said, notes, strict=True))


def test_no_crossover_is_claimed_from_one_form_alone() -> None:
    assert crossings(Findings(folder="t", bench=decode("absorbed", 1, 2, 3))) == []


def test_axes_have_units_and_differences_are_paired(folder: Path) -> None:
    found = read_results(folder)
    looks = style.looks(found.mechanisms)
    views = [*curve_views(found, looks), *trade_views(found, looks), *decoding_views(found, looks)]
    assert [view.name for view in views] == [
        "Validation",
        "Difference to mha",
        "Training",
        "Cache size",
        "Training speed",
        "Decoding speed",
        "Decode",
    ]
    for view in views:
        x, y = (view.figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        assert x and re.search(r"\((nats|ms)", y) and view.caption.endswith(".")
    last = {t["name"]: t["y"][-1] for t in views[1].figure["data"] if t.get("name")}
    for standing in found.standings:
        if standing.mechanism != "mha":
            assert last[standing.mechanism] == pytest.approx(standing.difference, abs=1e-4)


def test_a_mechanism_without_a_cache_is_named_where_a_log_axis_cannot_show_it(folder: Path) -> None:
    found = read_results(folder)
    cells = [replace(c, cache_bytes=0) if c.mechanism == "sliding" else c for c in found.cells]
    view = trade_views(replace(found, cells=cells), style.looks(found.mechanisms))[0]
    assert "sliding keeps no cache, which this axis cannot show" in view.caption
    assert "sliding" not in {trace.get("name") for trace in view.figure["data"]}


# Files


def test_one_file_that_asks_for_nothing(folder: Path) -> None:
    page = Tags(render(folder))
    for element, attributes in page.found:
        assert element not in ("link", "iframe", "object", "embed") or attributes.get("href") == "data:,"
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    policy = next(a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'")
    programs = [s for s in page.scripts if not s.startswith("{")]
    assert len(programs) == 3
    for program in programs:
        assert f"'sha256-{b64encode(hashlib.sha256(program.encode()).digest()).decode()}'" in policy


def test_every_section_is_there_with_heading_and_captions(folder: Path) -> None:
    page = render(folder)
    sections = re.findall(r'<section id="(\w+)" aria-labelledby="\1-title"><h2 id="\1-title">', page)
    assert sections == [
        "scoreboard",
        "curves",
        "trade",
        "decoding",
        "laws",
        "attention",
        "samples",
        "costs",
        "benchmarks",
        "fairness",
        "reproduce",
        "glossary",
    ]
    assert page.count("<h1>") == 1
    assert page.count("<table>") == page.count("<table><caption>") > 5
    text = Tags(page).text
    assert "attnlab compare quick --mechanisms mha,mqa" in text and "2.13.0" in text and "Xeon" in text
    assert "kv_rank" in text and "could not be done for mka" in text and "+3.6 %" in text


@pytest.mark.parametrize("gone", FILES)
def test_a_missing_file_costs_its_sections_and_says_what_makes_it(tmp_path: Path, gone: str) -> None:
    made = fixture.make(tmp_path / "r", layers=1, seeds=(0, 1), mechanisms=("mha", "mla"), failed=None)
    (made / gone).unlink()
    text = Tags(render(made)).text
    command = {"compare.json": "compare quick --out r", "bench.json": "demo --out r"}
    assert f"attnlab {command.get(gone, 'compare quick --mechanisms mha,mla')}" in text
    assert text.count("makes it.") == {"compare.json": 6, "bench.json": 2}.get(gone, 1)


def test_a_comparison_that_was_stopped_shows_what_is_finished(tmp_path: Path) -> None:
    rng = random.Random(1)
    for seed in (0, 1):
        run = tmp_path / "runs" / f"mla-s{seed}-abc"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(fixture.run("mla", seed, rng, luck=0).to_dict()))
    text = Tags(render(tmp_path)).text
    assert "mla has trained; nothing to compare with mha yet." in text
    assert "The comparison is not finished, so there are no paired differences" in text


def test_a_comparison_under_way_says_so(tmp_path: Path) -> None:
    made = fixture.make(tmp_path / "r", layers=1, mechanisms=("mha", "mla"), failed=None)
    data = json.loads((made / "compare.json").read_text())
    data["cells"] = data["cells"][:4]
    (made / "compare.json").write_text(json.dumps(data))
    assert "The comparison is not finished: 4 of its 6 runs have started." in headline(read_results(made))[1][-1]


def test_missing_numbers_are_not_zero(tmp_path: Path) -> None:
    """A NaN loss, as Python writes it, must neither reach the page's JSON nor count as a result."""
    made = fixture.make(tmp_path / "r", layers=1, seeds=(0,), mechanisms=("mha", "mla"), failed=None)
    data = json.loads((made / "compare.json").read_text())
    data["cells"][1] |= {"val_loss": float("nan"), "tokens_per_s": float("inf")}
    data["cells"][1]["curve"][3][1] = float("nan")
    data["summary"] = []
    (made / "compare.json").write_text(json.dumps(data))
    page = Tags(render(made))
    embedded = next(s for s in page.scripts if s.startswith("{"))
    json.loads(embedded, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "✗ no finished run" in page.text


def test_folders_that_cannot_be_read_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, said in (("nowhere", "there is no folder"), ("file", "is a file"), ("empty", "holds no results")):
        with pytest.raises(UserError, match=said) as error:
            write_report(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "empty" / "report.html").exists()


@pytest.mark.parametrize("damaged", FILES)
@pytest.mark.parametrize("content", ['{"format": 1, "cel', "7", '[{"law": 3}]', b"\xff\xfe\x00"])
def test_damaged_files_are_named_and_the_old_report_stays(tmp_path: Path, damaged: str, content: str | bytes) -> None:
    (tmp_path / damaged).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(UserError, match=damaged):
        write_report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([damaged, "report.html"])
    assert (tmp_path / "report.html").read_text() == "old"


def test_other_versions_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"format": 99, "cells": []}')
    with pytest.raises(UserError, match=r"compare\.json: its format is 99, this version reads 1"):
        render(tmp_path)
    (tmp_path / "compare.json").unlink()
    ragged = [{"mechanism": "mha", "seed": 0, "tokens": ["a", "b"], "layers": [[[[1, 0], [1]]]]}]
    (tmp_path / "attention.json").write_text(json.dumps(ragged))
    with pytest.raises(UserError, match=r"attention\.json .*differ in shape"):
        render(tmp_path)


def test_without_plotly_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UserError, match=re.escape("pip install 'attnlab[report]'")):
        render(folder)


def test_report_needs_neither_torch_nor_jax(folder: Path) -> None:
    program = (
        "import sys; from attnlab.report import render; assert 'plotly' not in sys.modules;"
        "render(sys.argv[1]); print([m for m in ('torch', 'jax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def poisoned(folder: Path) -> Path:
    """Every text that a user or a third-party package can bring is an attack."""
    fixture.make(folder, layers=1, seeds=(0, 1), mechanisms=("mha", "mla"), failed=("mla", 1))
    for name in FILES:
        file = folder / name
        data = file.read_text().replace('"mla"', json.dumps(ATTACK)).replace("NaN", ATTACK.replace('"', '\\"'))
        data = data.replace("KING RICHARD", json.dumps(ATTACK + "\ud800\u2028")[1:-1]).replace(
            "Xeon", json.dumps(ATTACK)[1:-1]
        )
        data = data.replace("attnlab compare", json.dumps(ATTACK)[1:-1]).replace('"causality"', json.dumps(ATTACK))
        data = (
            data.replace('"F"', json.dumps(ATTACK))
            .replace("k_proj", json.dumps(ATTACK)[1:-1])
            .replace("params", json.dumps(ATTACK)[1:-1])
        )
        file.write_text(data)
    return folder


def test_text_stays_text(tmp_path: Path) -> None:
    clean = Tags(
        render(fixture.make(tmp_path / "clean", layers=1, seeds=(0, 1), mechanisms=("mha", "mla"), failed=("mla", 1)))
    )
    page = Tags(render(poisoned(tmp_path / "poisoned")))
    assert len(page.scripts) == len(clean.scripts) == 4
    assert {tag for tag, _ in page.found} <= {tag for tag, _ in clean.found} | {"b"}
    assert page.text.count("onerror='window.hacked=2'") >= 8
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)


# In a browser


@pytest.fixture(scope="module")
def address(folder: Path) -> str:
    return write_report(folder).as_uri()


PAPER = "document.getElementById('plot-curves').layout.paper_bgcolor"
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture
def page(browser: chromium.Browser, address: str) -> Iterator[chromium.Browser]:
    """The report on a desktop in light; afterwards the console must be empty and the network untouched."""
    browser.prefer("light")
    browser.resize(1280, 900)
    browser.console.clear()
    browser.requests.clear()
    browser.open(address, READY)
    browser.run("localStorage.clear()")
    yield browser
    assert browser.console == []
    assert [r for r in browser.requests if not r.startswith(("file:", "data:", "blob:"))] == []


MIDDLE = """(() => {{ const e = document.querySelector('{0}');
  e.scrollIntoView({{block: 'center', behavior: 'instant'}});
  const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})()"""


def fits(browser: chromium.Browser) -> bool:
    return bool(browser.run("[document.documentElement, document.body].every(e => e.scrollWidth <= innerWidth)"))


@pytest.mark.browser
def test_figures_are_drawn_with_legends_and_fit(page: chromium.Browser) -> None:
    marks = "p.querySelectorAll('path.js-line, .point, image').length"
    drawn = page.run(f"[...document.querySelectorAll('.plot')].map(p => [p.id, {marks}])")
    assert [name for name, _ in drawn] == ["plot-curves", "plot-trade", "plot-decoding", "plot-attention"]
    assert all(marks > 0 for _, marks in drawn)
    legend = page.run("[...document.querySelectorAll('#decoding .legend button')].map(b => b.textContent)")
    assert {"mla expanded", "mla absorbed"} < set(legend) and len(legend) == 9
    assert "mla crossover" in page.run("document.getElementById('plot-decoding').textContent")
    assert fits(page)


@pytest.mark.browser
def test_phone(page: chromium.Browser, address: str) -> None:
    page.resize(390, 844, phone=True)
    page.open(address, READY)
    assert page.run("innerWidth") == 390 and fits(page)
    assert page.run("[...document.querySelectorAll('.plot .main-svg')].every(p => p.clientWidth <= innerWidth)")
    assert page.run("[...document.querySelectorAll('.scroll')].some(s => s.scrollWidth > s.clientWidth)")
    x, y, width, height = page.run(MIDDLE.format("#plot-curves"))
    shown = "JSON.stringify(document.getElementById('plot-curves').layout.xaxis.range)"
    before = page.run(shown)
    page.touch((x + width / 2, y + height * 0.6))
    page.wait("document.querySelector('#plot-curves .hoverlayer text')")
    said = page.run("document.querySelector('#plot-curves .hoverlayer').textContent")
    assert re.match(r"\w+ at step \d", said)
    assert page.run(shown) == before, "a tap must not zoom"
    start = page.run("scrollY")
    page.touch(*((x + width / 2, y + height / 2 - step) for step in range(0, 200, 20)))
    page.wait(f"scrollY > {start + 50}")


@pytest.mark.browser
def test_theme_follows_the_system_and_the_button_and_is_remembered(page: chromium.Browser, address: str) -> None:
    look_of = f"[getComputedStyle(document.body).backgroundColor, {PAPER}]"
    light = page.run(look_of)
    assert light == ["rgb(255, 255, 255)", "#ffffff"]
    page.prefer("dark")
    page.wait(f"{PAPER} !== '#ffffff'")
    dark = page.run(look_of)
    assert dark == ["rgb(23, 23, 26)", "#17171a"]
    assert page.run("document.getElementById('plot-curves').data.at(-1).line.color") in {
        dim for _, dim in style.PALETTE
    }
    page.run("document.activeElement.blur()")
    page.click("#theme")
    page.wait(f"{PAPER} === '#ffffff'")
    assert page.run(look_of) == light
    page.open(address, READY)
    assert page.run(look_of) == light
    assert page.run("document.getElementById('theme').getAttribute('aria-label')") == "Switch to the dark theme"


@pytest.mark.browser
def test_theme_works_where_storage_is_forbidden(page: chromium.Browser, address: str) -> None:
    forbid = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=forbid)["identifier"]
    try:
        page.open(address, READY)
        page.click("#theme")
        page.wait(f"{PAPER} === '#17171a'")
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


@pytest.mark.browser
def test_views_and_legend(page: chromium.Browser) -> None:
    page.click("#curves .views button", 1)
    page.wait("document.querySelector('#curves .ytitle').textContent.startsWith('difference to mha')")
    assert "below zero is better than mha" in page.run("document.querySelector('#curves figcaption').textContent")
    shown = "document.getElementById('plot-curves').data.filter(t => t.visible && t.meta === 'mla').length"
    assert page.run(shown) == 2
    page.click("#curves .legend button", 2)
    page.wait(f"{shown} === 0")
    assert page.run("document.querySelectorAll('#curves .legend button')[2].ariaPressed") == "false"
    page.click("#curves .legend button", 2)
    page.wait(f"{shown} === 2")


@pytest.mark.browser
def test_hover_names_mechanism_and_range(page: chromium.Browser) -> None:
    x, y, width, height = page.run(MIDDLE.format("#plot-curves"))
    page.point(x + width / 2 - 5, y + height / 2)
    page.point(x + width / 2, y + height / 2)
    page.wait("document.querySelector('#plot-curves .hoverlayer .legendtext')")
    said = page.run("document.querySelector('#plot-curves .hoverlayer').textContent")
    assert re.search(r"mla : \d\.\d{4} \(\d\.\d{4} to \d\.\d{4}\)", said)


@pytest.mark.browser
def test_attention_pickers_and_reading(page: chromium.Browser, folder: Path) -> None:
    maps = json.loads((folder / "attention.json").read_text())
    names = [m["mechanism"] for m in maps]
    cell = "document.getElementById('plot-attention').data[0].z[20][19] ** 2"
    sliding = names.index("sliding")
    for name, index in (("mechanism", sliding), ("layer", 1), ("head", 3)):
        select = f"document.getElementById('pick-{name}')"
        page.run(f"{select}.value = {index}, {select}.dispatchEvent(new Event('change'))")
    assert page.run(cell) == pytest.approx(maps[sliding]["layers"][1][3][20][19], abs=1e-4)
    page.click("#heads button", 0)
    assert page.run("[...document.querySelectorAll('.pickers select')].map(s => s.value)") == [
        str(sliding),
        "0",
        "0",
        "0",
    ]
    assert page.run(cell) == pytest.approx(maps[sliding]["layers"][0][0][20][19], abs=1e-4)
    show = "document.getElementById('pick-show')"
    page.run(f"{show}.value = 1, {show}.dispatchEvent(new Event('change'))")
    weighted = [w * v for w, v in zip(maps[sliding]["layers"][0][0][20], maps[sliding]["values"][0][0], strict=True)]
    assert page.run(cell) == pytest.approx(weighted[19] / sum(weighted), abs=1e-3)
    page.run(f"{show}.value = 0, {show}.dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('plot-attention').data[0].z[3][9]") is None
    x, y, width, height = page.run(MIDDLE.format("#plot-attention .nsewdrag"))
    tokens = len(maps[0]["tokens"])
    page.point(x + 2.7 * width / tokens, y + 10.5 * height / tokens)
    page.point(x + 2.5 * width / tokens, y + 10.5 * height / tokens)
    page.wait("document.querySelector('#reading .query').dataset.token === '10'")
    page.wait("document.querySelector('#plot-attention .hoverlayer text')")
    assert "looks at “r” (2)" in page.run("document.querySelector('#plot-attention .hoverlayer').textContent")


@pytest.mark.browser
def test_law_matrix_tells_the_counterexample_when_tapped(page: chromium.Browser) -> None:
    page.click(".law.broken", 1)
    assert page.run("document.getElementById('tip').hidden") is False
    said = page.run("document.getElementById('tip').textContent")
    assert "latent_lookup, dead parameters: broken. k_proj.weight" in said
    left, _, width, _ = page.run(MIDDLE.format("#tip"))
    assert left >= 0 and left + width <= page.run("innerWidth")
    page.run("dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
    assert page.run("document.getElementById('tip').hidden") is True


@pytest.mark.browser
def test_print_is_light(page: chromium.Browser, address: str) -> None:
    page.prefer("dark")
    page.open(address, READY)
    page.run(f"addEventListener('beforeprint', () => {{ window.printed = {PAPER}; }})")
    page.call("Page.printToPDF", preferCSSPageSize=True)
    assert page.run("window.printed") == "#ffffff"
    page.wait(f"{PAPER} === '#17171a'")


@pytest.mark.browser
def test_attacks_and_gaps_in_the_browser(browser: chromium.Browser, tmp_path: Path) -> None:
    browser.resize(390, 844, phone=True)
    browser.console.clear()
    browser.requests.clear()
    gaps = fixture.make(tmp_path / "gaps", seeds=(0,), mechanisms=("mha", "mla"), failed=("mla", 0), layers=1)
    for name in FILES[1:]:
        (gaps / name).unlink()
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws" / "laws.json").write_text(json.dumps([law.to_dict() for law in fixture.laws(["mha"])]))
    for folder in (poisoned(tmp_path / "poisoned"), gaps, tmp_path / "laws"):
        browser.open(write_report(folder).as_uri(), READY)
        assert browser.run("window.hacked") is None
        assert browser.run("document.images.length") == 0
        assert fits(browser), folder
    assert browser.console == []
    assert all(r.startswith(("file:", "data:")) for r in browser.requests)
