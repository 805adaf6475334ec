"""Extra files about the trained models of a comparison: laws, samples, attention maps and heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from .. import data
from ..errors import UserError
from ..files import read_json, write_bytes
from ..heads import value_sizes, watch, whole
from ..inference.generate import Sampling
from ..inference.text import sample_run
from ..laws import check_mechanism
from ..results import LawResult
from ..runs.folder import RunFolder, load_model
from .engines import Call, Engine, Outcome
from .grid import Grid
from .progress import ComparisonProgress

EXTRAS = ("laws", "samples", "attention")  # the files by default; also: "heads"
WINDOW = 32  # tokens whose attention is kept
SAMPLE = 240  # tokens of text


def write_extras(
    work: Grid, out: Path, engine: Engine, progress: ComparisonProgress, files: Sequence[str] = EXTRAS
) -> None:
    """Write `files` into `out`. A file that is newer than all finished runs stays as it is.

    "laws": of every mechanism. "samples" and "attention": of each mechanism's first finished run. "heads": of every
    finished run.
    """
    done = [cell for cell in work.cells if (result := cell.result()) is not None and result.status == "done"]
    first = {cell.label: cell for cell in reversed(done)}
    names = dict.fromkeys(name for label in work.mechanisms for name in label.split("+"))
    runs = {label: (label, cell.seed, cell.folder) for label, cell in first.items()}
    wanted: dict[str, dict[str, Call]] = {
        "laws": {name: Call(laws_of, (name,)) for name in names},
        "samples": {label: Call(sample_of, arguments) for label, arguments in runs.items()},
        "attention": {label: Call(attention_of, arguments) for label, arguments in runs.items()},
        "heads": {str(cell): Call(heads_of_run, (cell.label, cell.seed, cell.folder)) for cell in done},
    }
    newest = max((_changed(cell.folder / "result.json") for cell in done), default=0.0)
    order = [*work.mechanisms, *(name for name in names if name not in work.mechanisms)]
    stale = [file for file in files if not _fresh(out / f"{file}.json", newest, order)]
    calls = [(file, whose, call) for file in stale for whose, call in wanted[file].items()]
    entries: dict[str, list[dict[str, Any]]] = {file: [] for file in stale}

    def tell(number: int, outcome: Outcome, value: Any) -> None:
        file, whose, _ = calls[number]
        if outcome == "done":
            entries[file] += value
        elif outcome == "failed":
            progress.say(f"{file} of {whose}: {value}")

    if calls:
        progress.say(f"looking into what was trained: {', '.join(stale)}")
    engine.run([call for _, _, call in calls], tell)
    for file, found in entries.items():
        found.sort(key=lambda entry: (order.index(entry["mechanism"]), entry.get("seed", 0)))
        write_bytes(out / f"{file}.json", (json.dumps(found, allow_nan=False) + "\n").encode())


class Entry(TypedDict):
    """One entry of a file of extras, as far as it is looked at here."""

    mechanism: str


def _fresh(path: Path, newest: float, mechanisms: Sequence[str]) -> bool:
    """Whether a file is newer than the runs and speaks of these mechanisms alone; one that is damaged is made anew."""
    if _changed(path) <= newest:
        return False
    try:
        return {entry["mechanism"] for entry in read_json(path, list[Entry])} <= set(mechanisms)
    except UserError:
        return False


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def heads_of_run(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """Return what each head attends to, copies and is needed for; over training too, where checkpoints were kept."""
    steps = RunFolder.open(folder).steps()
    found = whole(load_model(folder)[0], run=folder if len(steps) > 2 else None)
    return [{"mechanism": label, "seed": seed} | found]


def laws_of(name: str, report: Any = None) -> list[dict[str, Any]]:
    """Return the results of every law for the mechanism."""
    return [LawResult.to_dict(result) for result in check_mechanism(name)]


def sample_of(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """Return a continuation of the first held-out tokens, no longer than the run was trained for."""
    config = RunFolder.open(folder).config
    count = min(24, max(1, config.model.context // 4))
    prompt = RunFolder.open(folder).tokenizer().decode(data.load(config.data).val.read(0, count).tolist())
    length = min(SAMPLE, config.model.context - count) if config.model.positions == "learned" else SAMPLE
    if length < 1:
        return []
    found = sample_run(folder, [prompt], Sampling(length, temperature=0.8, seed=seed), device="cpu")
    return [{"mechanism": label, "seed": seed, "prompt": prompt, "text": found.texts[0]}]


@torch.inference_mode()
def attention_of(label: str, seed: int, folder: Path, report: Any = None) -> list[dict[str, Any]]:
    """Return the attention weights of each head of each layer in a held-out window, and the size of each token's value.

    A layer that attends to no token has no heads.
    """
    model, config = load_model(folder)
    length = min(WINDOW, config.model.context)
    tokens = data.load(config.data).windows(1, length).x
    with watch(model) as seen:
        model(tokens)
    patterns = [layer.pattern()[0].tolist() if layer.maps else [] for layer in seen]
    layers = [[[[_three_digits(w) for w in row] for row in head] for head in heads] for heads in patterns]
    sizes = [None if size is None else size[0].tolist() for size in value_sizes(model, seen)]
    values = [None if size is None else [[float(f"{v:.3g}") for v in head] for head in size] for size in sizes]
    tokenizer = RunFolder.open(folder).tokenizer()
    words = [tokenizer.decode([token]) for token in tokens[0].tolist()]
    if not any(layers):
        return []
    return [{"mechanism": label, "seed": seed, "tokens": words, "layers": layers, "values": values}]


def _three_digits(weight: float) -> float:
    return float(f"{weight:.3g}") if weight >= 1e-5 else 0.0
