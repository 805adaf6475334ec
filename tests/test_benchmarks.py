"""The scripts of benchmarks/ run, each with its smallest settings; their numbers mean nothing here."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from attnlab import attention

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "benchmarks"
EIGHT = ["mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding"]


def run(script: str, *words: str | Path, here: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{here}/compiled"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without its head; a table has a column of numbers and no empty row."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        head, rule, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        assert set(rule) <= {"---", "---:"} and rows and all(len(row) == len(head) for row in rows), block
        found.append(rows)
    return found


def numbers(rows: list[list[str]], column: int) -> list[float]:
    """What a column begins with, all of them finite."""
    values = [float(row[column].replace(",", "").split()[0].rstrip("%")) for row in rows]
    assert all(map(math.isfinite, values))
    return values


def test_every_script_is_run_here() -> None:
    said = (HERE / "test_benchmarks.py").read_text("utf-8")
    assert [path.name for path in sorted(SCRIPTS.glob("*.py")) if f'"{path.name}"' not in said] == []


@pytest.mark.slow
def test_speed(tmp_path: Path) -> None:
    document = tmp_path / "made.md"
    document.write_text("# Mine\n\n<!-- begin decode -->\nold\n<!-- end decode -->\n\nThe end.\n")
    run("speed.py", "--small", "--only", "mechanisms,contexts,decode", "--document", document, here=tmp_path)
    text = document.read_text()
    assert text.startswith("# Mine") and "old" not in text and "The end." in text and "<!-- end mechanisms -->" in text
    decode, *train, contexts = tables(text)
    assert [row[0] for row in contexts] == ["mha", *(name for name in attention.names() if name != "mha")]
    assert min(numbers(contexts, 2)) > 0 and min(numbers(contexts, 5)) > 0 and numbers(contexts, 4)[0] == 1
    for rows in train:
        assert [row[0] for row in rows] == EIGHT
        assert min(numbers(rows, 2)) > 0 and min(numbers(rows, 3)) > 0 and numbers(rows, 1)[0] == 1
    assert len(train) == 2 and {row[0] for row in decode} == {"mha", "gqa", "mla expanded", "mla absorbed"}
    assert min(numbers(decode, 2)) > 0 and "Measured crossovers: mla" in text
    assert "python benchmarks/speed.py" in text and str(tmp_path) not in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="two of the contenders are compiled")
def test_speed_against_nanogpt(tmp_path: Path) -> None:
    """As docs/performance.md says, with a model of the same interface in nanoGPT's place."""
    (tmp_path / "nano").mkdir()
    shutil.copy(HERE / "small_gpt.py", tmp_path / "nano" / "model.py")
    words = [
        "--small",
        "--only",
        "train-vs-nanogpt",
        "--nanogpt",
        tmp_path / "nano",
        "--document",
        tmp_path / "made.md",
    ]
    run("speed.py", *words, here=tmp_path)
    text = (tmp_path / "made.md").read_text()
    (rows,) = tables(text)
    assert [row[0].split(",")[0] for row in rows] == ["nanoGPT"] * 2 + ["attnlab"] * 3
    assert all(min(numbers(rows, column)) > 0 for column in (1, 2, 4, 5))
    losses = re.search(r"nanoGPT \(fp32\) ([\d.]+), attnlab \(\w+\) ([\d.]+), difference", text)
    assert losses, text
    theirs, ours = map(float, losses.groups())
    assert 4 < theirs < 4.3 and abs(theirs - ours) < 0.02, "both began with the same weights, near ln 65"


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    done = run("decode.py", "--small", "--ways", "transformers;attnlab", "--document", "-", here=tmp_path)
    (rows,) = tables(done.stdout)
    assert [row[0] for row in rows] == [
        f"{way}, {name}" for name in ("fp32", "bf16") for way in ("transformers", "attnlab")
    ]
    assert min(numbers(rows, 1)) > 0 and [row[-1] for row in rows][:2] == ["4 of 4"] * 2
    assert min(numbers(rows, 6)) >= 0, "MiB that it grew by"


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ("transformers;attnlib", "names 'attnlib': give some of transformers; attnlab; attnlab, compiled"),
        ("", "names ''"),
        ("attnlab", "lacks 'transformers'"),
        ("transformers;attnlab, compiled", "lacks 'attnlab'"),
    ],
)
def test_decode_asks_first_which_ways_it_knows(
    ways: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    decode = importlib.import_module("decode")
    monkeypatch.setattr(sys, "argv", ["decode.py", "--small", "--document", "-", "--ways", ways])
    with pytest.raises(SystemExit) as stop:
        decode.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_conversion_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = ["--small", "--out", tmp_path / "runs", "--document", tmp_path / "made.md"]
    for _ in range(2):
        done = run("conversion.py", *words, here=tmp_path)
        (rows,) = tables((tmp_path / "made.md").read_text())
        assert sum(row[0].startswith("mla, ") for row in rows) == 6 and "gqa, first" in {row[0] for row in rows}
        assert any(row[3] == "exact" for row in rows)
        assert min(numbers(rows, 4)) > 0 and min(numbers(rows, 5)) > 0
        assert ElementTree.fromstring((tmp_path / "made.svg").read_text()).tag.endswith("svg")
    assert "loss" not in done.stderr, "nothing was trained again"


@pytest.mark.slow
def test_induction(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = tmp_path / "made.md"
    run("induction.py", "--small", "--out", tmp_path / "runs", "--document", document, here=tmp_path)
    text = document.read_text()
    for rows in tables(text):
        assert [row[0] for row in rows] == ["mha", "mla"]
        assert all(0 <= value <= 1 for value in numbers(rows, 2)) and min(numbers(rows, -1)) > 0
    assert len(tables(text)) == 2 and "nan" not in text and str(tmp_path) not in text
    assert (tmp_path / "made.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "runs" / "time.json").read_text())["calls"] == 1


@pytest.mark.slow
def test_plan(tmp_path: Path) -> None:
    (rows,) = tables(run("plan.py", "--only", "mha", here=tmp_path).stdout)
    assert [row[0] for row in rows] == ["mha"]
    assert max(abs(numbers(rows, column)[0]) for column in range(1, len(rows[0]))) < 5, "per cent that a plan is off"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4") or not hasattr(os, "fork"), reason="it forks, and asks what a child used")
def test_prepare(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    words = ["--small", "--only", "preparing,reading,memory", "--document", tmp_path / "made.md"]
    run("prepare.py", *words, here=tmp_path)
    preparing, reading, memory = tables((tmp_path / "made.md").read_text())
    assert len(preparing) == 3 and min(numbers(preparing, 1)) > 0 and min(numbers(preparing, 3)) > 0
    assert len(reading) == 4 and min(numbers(reading, 1)) > 0
    assert len(memory) == 4 and min(numbers(memory, 1)) > 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits memory")
def test_audit_survey(tmp_path: Path) -> None:
    """It goes on where it stopped, and keeps the words of audit_findings.json beside what they are about."""
    pytest.importorskip("transformers")
    assert '"audit_findings.json"' in (SCRIPTS / "audit_survey.py").read_text("utf-8")
    words = ["--packages", "transformers", "--only", "llama,gpt2", "--out", tmp_path / "rows.jsonl"]
    for left in ("2", "0"):
        done = run("audit_survey.py", *words, "--document", tmp_path / "made.md", here=tmp_path)
        assert f"2 classes of different text, {left} to audit" in done.stderr
    totals, classes, why = tables((tmp_path / "made.md").read_text())
    assert [row[0].split()[0] for row in totals] == ["transformers"] and numbers(totals, 1) == [2]
    assert [row[0].split()[0] for row in classes] == ["gpt2/GPT2Attention", "llama/LlamaAttention"]
    gpt2, llama = classes
    assert gpt2[2] == "modes" and gpt2[4].startswith("real:") and llama[2] == "" and llama[3] == "32"
    assert min(numbers(why, 1)) > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a call is a forked child")
def test_refusals(tmp_path: Path) -> None:
    """Its cases are those of "refusal_cases.py"."""
    assert "from refusal_cases import" in (SCRIPTS / "refusals.py").read_text("utf-8")
    done = run("refusals.py", "--only", "python: attnlab.Mask(window=-1)", here=tmp_path)
    assert tables(done.stdout) == [[["python", "1", "0"], ["all", "1", "0"]]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with /proc and fork")
def test_faults(tmp_path: Path) -> None:
    """It runs fault_worker.py, as a program and as a server."""
    assert '"fault_worker.py"' in (SCRIPTS / "faults.py").read_text("utf-8")
    done = run("faults.py", "--only", "guard stop, a spike", here=tmp_path)
    (rows,) = tables(done.stdout)
    assert [row[:2] for row in rows] == [["guard stop, a spike", "yes"]] and numbers(rows, 2)[0] > 0
    assert "1 of 1 survived" in done.stderr


def test_faults_says_what_did_not_survive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    faults = importlib.import_module("faults")

    def dies(lab: object) -> None:
        raise AssertionError("other weights\nand more")

    def cannot(lab: object) -> None:
        raise faults.NotPossible("no file system may be mounted here")

    monkeypatch.setattr(faults, "Lab", lambda home, fast: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(sys, "argv", ["faults.py"])
    monkeypatch.setattr(faults, "FAULTS", {"one": dies, "two": cannot})
    assert faults.main() == 1
    said = capsys.readouterr()
    assert "| one | NO |  | other weights |" in said.out and "| two | not tried |" in said.out
    assert "0 of 2 survived" in said.err
    monkeypatch.setattr(faults, "FAULTS", {"two": cannot})
    assert faults.main() == 0


def test_results_are_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    results = importlib.import_module("results")

    def cell(name: str, seed: int, shares: list[float]) -> dict[str, Any]:
        lengths = [{"length": at, "accuracy": share} for at, share in zip(results.LENGTHS, shares, strict=False)]
        return {"mechanism": name, "seed": seed, "status": "done", "lengths": lengths}

    cells = [cell("mha", 0, [1.0, 0.5, 0.25]), cell("mha", 1, [0.99, 0.75, 0.25]), cell("mla", 0, [0.5])]
    monkeypatch.setattr(results, "compared", lambda options, name, words: {"tasks": [{"cells": cells}]})
    monkeypatch.setattr(
        sys, "argv", ["results.py", "--small", "--only", "copying", "--document", str(tmp_path / "a.md")]
    )
    results.main()
    text = (tmp_path / "a.md").read_text()
    (rows,) = tables(text)
    assert rows[0][:5] == ["mha", "99.5", "62.5 (50.0)", "25.0", "-"] and rows[1][:3] == ["mla", "50.0", "-"]
    assert "attnlab compare copying --mechanisms mha,mla --seeds 2" in text
