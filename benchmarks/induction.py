"""Which mechanisms form induction heads, when, and how sure is that? Written into docs/induction.md, with a figure.

    python benchmarks/induction.py                     about 40 minutes on 2 cores; goes on where it stopped
    python benchmarks/induction.py --small --document -    a minute, to see that it works

Two and four layers of every mechanism at equal parameters, three paired seeds, on two corpora that repeat in context:
random symbols whose blocks come again in another order (the preset `repeats`), and Shakespeare in phrases, each said
four times. Each of the four is `attnlab compare ... --match params --heads`; a folder of results holds them, and is
read again where it is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed import markdown, provenance, say

from attnlab import presets
from attnlab.comparison.compare import compare
from attnlab.comparison.grid import Comparison
from attnlab.config import DataConfig, RunConfig
from attnlab.data.texts import shakespeare
from attnlab.files import write_bytes, write_json
from attnlab.stats import paired
from attnlab.terminal.progress import Progress

MECHANISMS = ("mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding")
OPTIONS: dict[str, dict[str, Any]] = {"gqa": {"n_kv_heads": 2}, "sliding": {"window": 16}, "msla": {"top_k": 16}}
CORPORA = {"symbols": "repeated symbols", "phrases": "phrases of Shakespeare"}
FORMED = 0.15  # a marked head with this share of its attention on the right token: three times what chance gives it
DOCUMENT = Path(__file__).parents[1] / "docs" / "induction.md"

Entry = dict[str, Any]  # one run: what heads.json holds of it, and its cell of compare.json
Found = dict[tuple[str, int], list[Entry]]  # corpus, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("induction"), help="the folder of results (default induction)")
    parser.add_argument("--small", action="store_true", help="a few steps, one seed, two mechanisms, two layers")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="- to write none")
    options = parser.parse_args()
    mechanisms = MECHANISMS[:4:3] if options.small else MECHANISMS
    seeds = 1 if options.small else 3
    found: Found = {}
    with clocked(options.out / "time.json"):
        for corpus in CORPORA:
            for layers in (2,) if options.small else (2, 4):
                folder = options.out / f"{corpus}-{layers}"
                say(f"{CORPORA[corpus]}, {layers} layers, into {folder}")
                compare(
                    Comparison(
                        config_of(corpus, layers, options.small, options.out),
                        mechanisms,
                        seeds,
                        match="params",
                        options=options_of(mechanisms),
                    ),
                    folder,
                    extras=("heads",),
                    command=f"python benchmarks/{Path(__file__).name}",
                    show=Progress,
                )
                found[corpus, layers] = entries_of(folder)
    text = document(found, mechanisms, seeds, json.loads((options.out / "time.json").read_text()))
    print(text)
    if str(options.document) != "-":
        options.document.write_text(text, "utf-8")
        figure(found, mechanisms, options.document.with_suffix(".png"))


def options_of(mechanisms: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: fields for name, fields in OPTIONS.items() if name in mechanisms}


@contextmanager
def clocked(path: Path) -> Iterator[None]:
    """Adds the seconds that passed, and those of all processors, to what earlier calls left in `path`."""
    began, spent = time.monotonic(), sum(os.times()[:4])
    try:
        yield
    finally:
        before = json.loads(path.read_text()) if path.exists() else {"wall": 0.0, "cpu": 0.0, "calls": 0}
        more = {"wall": time.monotonic() - began, "cpu": sum(os.times()[:4]) - spent, "calls": 1}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {name: before[name] + value for name, value in more.items()})


def config_of(corpus: str, layers: int, small: bool, out: Path) -> RunConfig:
    base = presets.get("repeats")
    train = base.train
    if corpus == "phrases":
        train = replace(train, lr=3e-3, min_lr=3e-4)
        base = replace(base, data=DataConfig(source=f"text:{phrases(out / 'phrases.txt')}"))
    if small:
        train = replace(train, steps=6, batch_size=2, warmup=2, eval_every=6, save_every=2)
    model = replace(base.model, n_layers=layers)
    return replace(base, name=f"{corpus}-{layers}", model=model, train=train)


def phrases(path: Path) -> Path:
    """Shakespeare in small letters, cut into phrases of 5 to 32 characters, each of them four times in a row. The
    letters are small so that random ones, with which heads are measured, are letters that were often seen."""
    if not path.exists():
        text, dice, at, parts = shakespeare().lower(), random.Random(0), 0, []
        while at < len(text):
            length = dice.randint(5, 32)
            parts.append(4 * text[at : at + length])
            at += length
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, "".join(parts).encode())
    return path


def entries_of(folder: Path) -> list[Entry]:
    cells = {(c["mechanism"], c["seed"]): c for c in json.loads((folder / "compare.json").read_text())["cells"]}
    entries = json.loads((folder / "heads.json").read_text())
    return [entry | {"cell": cells[entry["mechanism"], entry["seed"]]} for entry in entries]


def title(corpus: str) -> str:
    return CORPORA[corpus][0].upper() + CORPORA[corpus][1:]


def strongest(layers: list[list[float]]) -> float:
    return max(value for row in layers for value in row)


def best_head(entry: Entry) -> tuple[int, int]:
    """Layer and head of the highest induction score."""
    scores = entry["scores"]["scores"]["induction"]
    return max(((i, j) for i, row in enumerate(scores) for j, _ in enumerate(row)), key=lambda at: scores[at[0]][at[1]])


def formed(entry: Entry) -> bool:
    scores, marked = (entry["scores"][kind]["induction"] for kind in ("scores", "marked"))
    pairs = zip(scores, marked, strict=True)
    return any(mark and score >= FORMED for row in pairs for score, mark in zip(*row, strict=True))


def formed_at(entry: Entry) -> int | None:
    """The first checkpoint from which on the strongest head stays at `FORMED`, where one has formed."""
    curve = entry["emergence"]
    best = [strongest(layers) for layers in curve["scores"]["induction"]]
    late = max((i for i, value in enumerate(best) if value < FORMED), default=-1) + 1
    return curve["steps"][late] if formed(entry) and late < len(best) else None


def of(entries: list[Entry], mechanism: str) -> list[Entry]:
    return [entry for entry in entries if entry["mechanism"] == mechanism]


def document(found: Found, mechanisms: tuple[str, ...], seeds: int, spent: dict[str, float]) -> str:
    every = [entry for entries in found.values() for entry in entries]
    points = len(every[0]["emergence"]["steps"])
    scored = every[0]["scores"]
    calls = "" if spent["calls"] == 1 else f", in {spent['calls']:.0f} calls"
    parts = [
        "# Which mechanisms form induction heads?",
        "",
        "An induction head looks for an earlier copy of the current token and attends to what followed it "
        "(Olsson et al. 2022, arXiv 2209.11895). Small models of each mechanism were trained at equal parameters, with "
        f"{seeds} paired seed{'s' * (seeds > 1)}, and measured at {points} points of training, as "
        "[Inside the heads](heads.md) says.",
        "",
        f"{provenance()} {spent['wall'] / 60:.0f} minutes by the clock and {spent['cpu'] / 60:.0f} of processor "
        f"time for {len(every)} runs and all that was measured on them{calls}.",
        "",
        "## The answer",
        "",
        *conclusions(found, mechanisms, seeds),
        "",
        "![Strongest induction head over training, by mechanism](induction.png)",
        "",
        "## How sure this is",
        "",
        f"- *A head*: measured on {scored['sequences']} sequences each of random tokens, {spoken(scored['segments'])} "
        "long and repeated once. A head is *marked* where its score lies above the same head's on sequences without a "
        "repeat, and above what heads of untrained models of the same shape score, at "
        f"{scored['alpha']} after Holm's correction over all heads and scores of the model. "
        f"It counts as *formed* where it is marked and gives at least {FORMED} of its attention to the right token, "
        "three times what untrained heads give; *chance* in the tables is the higher of both nulls.",
        f"- *A mechanism*: {sureness(seeds)}",
        "- *Beside mha*: the difference of the strongest head's score, paired by seed, with its 95 % interval. The "
        "intervals are not corrected for how many there are; an interval that holds 0 distinguishes nothing.",
        "- *The cause*: what it costs on the repeat, in nats per token, when one head says its mean: the strongest "
        "induction head, and whichever head is needed most. Heads that do the same work stand in for each other, so "
        "a small cost of one does not say that the kind is not needed.",
        "",
    ]
    for (corpus, layers), entries in found.items():
        parts += [f"## {title(corpus)}, {layers} layers", "", rows(entries, mechanisms), ""]
    parts += [
        "*Induction*, *chance*: share of attention, mean over seeds and range. *Marked*, *formed*: in how many seeds; "
        "the step is the checkpoint from which on it stays formed, median and range. *Gain*: nats by which the "
        "repeat of random tokens is easier than the tokens themselves. *Without it*, *without the worst*: the cost of "
        "ablation. *Loss*: held out, nats per token.",
        "",
        "## What was trained",
        "",
        "*Repeated symbols* is the preset `repeats`: different symbols of 64, in blocks of 4, then the same blocks in "
        "another order; only what can be known is asked. Guessing among the symbols seen has a loss of 3.5. Training "
        "begins with sequences of a quarter and a half of the context, and the loss is always held out at the whole "
        "one, so it rises before it falls. One setting of it, with the report, is",
        "",
        "```console",
        f"attnlab compare repeats --mechanisms {','.join(mechanisms)} --match params --heads \\",
        f"  --options '{json.dumps(options_of(mechanisms))}' --out compare/repeats",
        "attnlab report compare/repeats",
        "```",
        "",
        "*Phrases of Shakespeare* is the text in small letters, cut into phrases of 5 to 32 characters, each said four "
        "times in a row. The held-out tenth has other phrases. Heads are measured on random letters there too, which "
        "is not what they were trained on.",
        "",
        "## What this does not say",
        "",
        "Larger models, longer training or other data may form what is missing here; *not formed* means *not within "
        "these steps*. The score reads attention to positions: fast_mka's keys already mix what came before, so it can "
        "do the same work without the pattern, which is why gain and loss stand beside it. sliding sees 16 tokens per "
        "layer, so the longest of the three repeats is out of its sight whatever it learns. All mechanisms share one "
        "learning rate, chosen with mha.",
    ]
    return "\n".join(parts) + "\n"


def spoken(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]} tokens"


def sureness(seeds: int) -> str:
    """What so many seeds can say at all: the exact one-sided bound on a share of which all, or none, were seen."""
    bound = 0.05 ** (1 / seeds)
    return (
        f"{seeds} of {seeds} seeds says, at 95 %, that more than {bound:.0%} of all seeds would form such a head; 0 of "
        f"{seeds}, that fewer than {1 - bound:.0%} would. Anything between is open."
    )


def rows(entries: list[Entry], mechanisms: tuple[str, ...]) -> str:
    table = []
    best = {m: [strongest(e["scores"]["scores"]["induction"]) for e in of(entries, m)] for m in mechanisms}
    for mechanism in mechanisms:
        own = of(entries, mechanism)
        if not own:
            table.append([mechanism, *["failed"] * 10])
            continue
        at = [best_head(e) for e in own]
        chance = [
            max(e["scores"][null]["induction"][i][j] for null in ("untrained", "not_repeated"))
            for e, (i, j) in zip(own, at, strict=True)
        ]
        marked = sum(any(m for row in e["scores"]["marked"]["induction"] for m in row) for e in own)
        steps = [step for e in own if (step := formed_at(e)) is not None]
        when = f", step {statistics.median(steps):.0f} ({min(steps)} to {max(steps)})" if steps else ""
        gain = [e["ablation"]["first_half"] - e["ablation"]["second_half"] for e in own]
        table.append(
            [
                mechanism,
                f"{own[0]['cell']['parameters']:,}",
                ranged(best[mechanism]),
                f"{statistics.fmean(chance):.2f}",
                "" if mechanism == "mha" else beside(best[mechanism], best.get("mha", [])),
                f"{marked} of {len(own)}",
                f"{sum(map(formed, own))} of {len(own)}{when}",
                ranged(gain),
                ranged([e["ablation"]["change"][i][j] for e, (i, j) in zip(own, at, strict=True)]),
                f"{statistics.fmean(strongest(e['ablation']['change']) for e in own):.2f}",
                f"{statistics.fmean(e['cell']['val_loss'] for e in own):.3f}",
            ]
        )
    head = ["mechanism", "parameters", "induction", "chance", "beside mha", "marked", "formed", "gain", "without it"]
    return markdown([*head, "without the worst", "loss"], table)


def ranged(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def beside(ours: list[float], mha: list[float]) -> str:
    if len(ours) != len(mha) or (found := paired(ours, mha)).interval is None:
        return ""
    return f"{found.mean:+.2f} ({found.interval[0]:+.2f} to {found.interval[1]:+.2f})"


def conclusions(found: Found, mechanisms: tuple[str, ...], seeds: int) -> list[str]:
    """Read off the numbers, whatever they are."""
    lines = []
    for (corpus, layers), entries in found.items():
        count = {m: sum(map(formed, of(entries, m))) for m in mechanisms}
        groups = {f"in all {seeds}": [m for m in mechanisms if count[m] == seeds]}
        groups |= {f"in {n} of {seeds}": [m for m in mechanisms if count[m] == n] for n in range(seeds - 1, 0, -1)}
        groups["in none"] = [m for m in mechanisms if not count[m]]
        said = "; ".join(f"{', '.join(names)} {key}" for key, names in groups.items() if names)
        caution = ""
        if count.get("mha", seeds) < seeds:
            caution = " mha itself does not always form them here, so what is missing may be training, not mechanism."
        lines.append(f"- {title(corpus)}, {layers} layers, seeds with an induction head: {said}.{caution}")
    return lines


def figure(found: Found, mechanisms: tuple[str, ...], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = ("#1d1d1b", "#41a0db", "#009e73", "#0072b2", "#d55e00", "#c06a99", "#dc9400", "#968700")  # Okabe and Ito
    markers = "osD^vPX*"
    page = Figure(figsize=(10, 7), dpi=150, layout="constrained")
    axes = page.subplots(len(CORPORA), len(found) // len(CORPORA), squeeze=False).ravel()
    for axis, ((corpus, layers), entries) in zip(axes, found.items(), strict=True):
        for number, mechanism in enumerate(mechanisms):
            curves = [e["emergence"] for e in of(entries, mechanism)]
            if not curves:
                continue
            best = torch.tensor([[strongest(layer) for layer in c["scores"]["induction"]] for c in curves])
            style = {"color": colours[number], "marker": markers[number], "markersize": 4, "label": mechanism}
            axis.plot(curves[0]["steps"], best.mean(0), **style)
            axis.fill_between(curves[0]["steps"], best.amin(0), best.amax(0), color=colours[number], alpha=0.15)
        axis.axhline(FORMED, color="#8a8781", linewidth=0.8, linestyle=":")
        axis.set_title(f"{CORPORA[corpus]}, {layers} layers", fontsize=10)
        axis.set_xlabel("training step")
        axis.set_ylabel("induction score of the strongest head")
        axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    page.suptitle(f"Mean over seeds; bands from the lowest seed to the highest; dotted: {FORMED}, formed", fontsize=10)
    FigureCanvasAgg(page).print_png(str(path))


if __name__ == "__main__":
    main()
