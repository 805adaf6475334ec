"""benchmarks/induction.py reads its document off the numbers, and says how sure it is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnlab.stats import paired


@pytest.fixture
def induction(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("induction")


def entry(mechanism: str, seed: int, curve: list[float], *, marked: bool = True) -> dict[str, Any]:
    """Two layers of two heads, whose last one has the score `curve`."""
    layers = [[[0.05, 0.05], [0.04, value]] for value in curve]
    last, null = layers[-1], [[0.05, 0.05], [0.05, 0.06]]
    return {
        "mechanism": mechanism,
        "seed": seed,
        "scores": {
            "scores": {"induction": last},
            "marked": {"induction": [[False, False], [False, marked]]},
            "untrained": {"induction": null},
            "not_repeated": {"induction": null},
            "alpha": 0.01,
            "sequences": 64,
            "segments": [8, 16, 32],
        },
        "emergence": {"steps": [100 * (i + 1) for i in range(len(curve))], "scores": {"induction": layers}},
        "ablation": {"first_half": 4.5, "second_half": 1.25, "change": [[0.9, 0.0], [0.1, 0.2 + seed / 10]]},
        "cell": {"parameters": 1234, "val_loss": 2.5},
    }


def test_formed_is_marked_and_strong_and_dated_from_when_it_stays(induction: ModuleType) -> None:
    late = entry("mha", 0, [0.05, 0.4, 0.1, 0.5, 0.6])
    assert induction.formed(late) and induction.formed_at(late) == 400
    assert induction.formed_at(entry("mha", 0, [0.4, 0.5, 0.05])) is None
    assert not induction.formed(entry("mha", 0, [0.05, 0.6], marked=False))
    assert induction.formed_at(entry("mha", 0, [0.05, 0.6], marked=False)) is None


def test_the_document_says_what_was_found_and_how_sure(induction: ModuleType) -> None:
    mha = [entry("mha", seed, [0.05, 0.5 + seed / 10]) for seed in range(3)]
    mla = [entry("mla", seed, [0.05, 0.1 + seed / 10]) for seed in range(3)]
    none = [entry("mqa", seed, [0.05, 0.05], marked=False) for seed in range(3)]
    found = {("symbols", 2): [*mha, *mla, *none]}
    said = induction.document(found, ("mha", "mqa", "mla"), 3, {"wall": 2280.0, "cpu": 4260.0, "calls": 1})
    assert "Repeated symbols, 2 layers, seeds with an induction head: mha in all 3; mla in 2 of 3; mqa in none." in said
    assert "38 minutes by the clock and 71 of processor time for 9 runs" in said
    assert "more than 37% of all seeds" in said and "fewer than 63%" in said
    row = next(line for line in said.splitlines() if line.startswith("| mla"))
    assert "| 0.20 (0.10 to 0.30) | 0.06 |" in row and "| 3 of 3 | 2 of 3, step 200 (200 to 200) |" in row
    low, high = paired([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).interval or (0.0, 0.0)
    assert f"-0.40 ({low:+.2f} to {high:+.2f})" in row
    assert "| 3.25 (3.25 to 3.25) | 0.30 (0.20 to 0.40) | 0.90 | 2.500 |" in row
    assert "may be training, not mechanism" not in said
    found = {("symbols", 2): none}
    assert "failed" in induction.rows(none, ("mha", "mqa"))
    assert "may be training, not mechanism" in "".join(induction.conclusions(found, ("mha", "mqa"), 3))


def test_phrases_are_the_text_four_times(induction: ModuleType, tmp_path: Path) -> None:
    text = induction.phrases(tmp_path / "new" / "phrases.txt").read_text()
    whole, at, many = induction.shakespeare().lower(), 0, 0
    place = 0
    while place < 20_000:
        length = next(n for n in range(5, 33) if text[place : place + 4 * n] == 4 * whole[at : at + n])
        place, at, many = place + 4 * length, at + length, many + 1
    assert many > 200 and len(text) == 4 * len(whole)
    made = induction.phrases(tmp_path / "phrases.txt").read_text()
    assert made == text, "the same for everybody"


def test_time_adds_up_over_calls(induction: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "time.json"
    with pytest.raises(KeyboardInterrupt), induction.clocked(path):
        raise KeyboardInterrupt
    first = json.loads(path.read_text())
    with induction.clocked(path):
        sum(range(10**5))
    second = json.loads(path.read_text())
    assert (first["calls"], second["calls"]) == (1, 2) and second["wall"] > first["wall"] > 0
