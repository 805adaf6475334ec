"""Our own results, made by attnlab's commands and written into docs/results.md. Anyone can run it:

    python benchmarks/results.py --out runs/results      all of it: a few hours on two cores
    python benchmarks/results.py --only states           one section; the others stay in the document as they are
    python benchmarks/results.py --small --document FILE --out FOLDER    a minute, to see that it runs

text      every mechanism on Shakespeare's characters, at equal parameters, three seeds
states    recall (mqar) by mechanisms with a state of constant size, against its size
copying   every token again, and needle  few things among many, by one mechanism of each family

A run that was interrupted goes on with the same command. Nothing is timed, so other work may go on beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from speed import markdown, write_section

from attnlab import attention
from attnlab.model import attention_configs
from attnlab.presets import get, variant

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
STATES = ("linear", "mamba2", "gated_delta", "kda")
FAMILIES = ("mha", "mla", "sliding", *STATES)
WIDTHS = (8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256)
TINY = ["--model.d-model", "16", "--model.n-heads", "2", "--model.n-layers", "2", "--model.context", "32"]
SHORT = ["--train.steps", "4", "--train.eval-every", "2", "--train.eval-batches", "1", "--train.batch-size", "2"]


def compared(options: argparse.Namespace, name: str, words: Sequence[str]) -> dict[str, Any]:
    """Run `attnlab compare` with these words, or go on with it, and return its compare.json."""
    folder = options.out / name
    seeds = ["--seeds", "2"] if options.small else []
    small = [*(TINY if words[0] == "quick" else []), *SHORT] if options.small else []
    line = ["attnlab", "compare", *words, *seeds, *small, "--jobs", str(options.jobs), "--out", str(folder)]
    print(shlex.join(line), file=sys.stderr)
    subprocess.run([sys.executable, "-m", *line], check=True)
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text())
    return found


def text(options: argparse.Namespace) -> str:
    names = ["mha", "gqa"] if options.small else ["mha", *(n for n in attention.names() if n != "mha")]
    words = ["quick", "--mechanisms", ",".join(names), "--match", "params", "--seeds", "3"]
    found = compared(options, "text", words)
    cells = {cell["mechanism"]: cell for cell in found["cells"] if cell["status"] == "done"}
    rows = []
    for row in sorted(found["summary"], key=lambda each: each["val_loss"] or 99):
        cell = cells[row["mechanism"]]
        interval = row["interval"] or [None, None]
        rows.append(
            [
                row["mechanism"],
                number(row["val_loss"], ".4f"),
                number(row["difference"], "+.4f"),
                " to ".join(number(end, "+.4f") for end in interval),
                row["verdict"],
                f"{cell['parameters']:,}",
                f"{cell['cache_bytes'] / 1024:,.1f}",
            ]
        )
    about = found["statistics"]
    head = ["", "val loss, nats", "difference to mha", "95 %, all together", "verdict", "parameters", "cache, KiB"]
    said = f"{about['why']} The margin of *equal* is {about['margin']:g} nats."
    return f"`{command(words)}`: {shape('quick')}. {said}\n\n{markdown(head, rows)}"


def states(options: argparse.Namespace) -> str:
    widths = WIDTHS[:1] if options.small else WIDTHS
    names = STATES[:2] if options.small else STATES
    lines, rows = [], []
    for width in widths:
        given = json.dumps({name: {"head_dim": width} for name in names})
        words = ["mqar", "--mechanisms", ",".join(names), "--options", given, "--seeds", "2"]
        lines.append(command(words))
        found = compared(options, f"states-{width}", words)
        for name in names:
            layer = attention_configs(variant(get("mqar"), name, {name: {"head_dim": width}}).model)[0]
            floats = layer.cache_spec.floats(0)
            rows.append([name, f"{width}", f"{floats:,}", *accuracies(found, name)])
    words = ["mqar", "--mechanisms", "mha,sliding", "--seeds", "2"]
    lines.append(command(words))
    found = compared(options, "states-rows", words)
    rows += [
        [name, "32", "grows" if name == "mha" else "2,048 (ring)", *accuracies(found, name)]
        for name in ("mha", "sliding")
    ]
    rows.sort(key=lambda row: ([*STATES, "mha", "sliding"].index(row[0]), int(row[1])))
    head = ["", "H", "floats of state, a layer", *(f"{length} tokens" for length in LENGTHS)]
    made = "\n".join(f"    {line}" for line in lines)
    return f"{shape('mqar')}. Made by\n\n{made}\n\n{asked()}\n\n{markdown(head, rows)}"


def recall(task: str) -> Callable[[argparse.Namespace], str]:
    def section(options: argparse.Namespace) -> str:
        names = FAMILIES[:2] if options.small else FAMILIES
        words = [task, "--mechanisms", ",".join(names), "--seeds", "2"]
        found = compared(options, task, words)
        rows = [[name, *accuracies(found, name)] for name in names]
        head = ["", *(f"{length} tokens" for length in LENGTHS)]
        return f"`{command(words)}`. {asked()}\n\n{markdown(head, rows)}"

    return section


def asked() -> str:
    return (
        "Right answers among held-out questions, in percent, trained on up to 64 tokens: the mean of two seeds, and in "
        "brackets the lowest where the two differ by five or more"
    )


def accuracies(found: dict[str, Any], name: str) -> Iterable[str]:
    """The share of right answers at each length, over the seeds."""
    (task,) = found["tasks"]
    runs = [cell for cell in task["cells"] if cell["mechanism"] == name and cell["status"] == "done"]
    for length in LENGTHS:
        shares = [100 * at["accuracy"] for cell in runs for at in cell["lengths"] if at["length"] == length]
        if not shares:
            yield "-"
        elif max(shares) - min(shares) < 5:
            yield f"{fmean(shares):.1f}"
        else:
            yield f"{fmean(shares):.1f} ({min(shares):.1f})"


def command(words: Sequence[str]) -> str:
    return shlex.join(["attnlab", "compare", *words])


def shape(preset: str) -> str:
    model = get(preset).model
    return f"{model.n_layers} layers, {model.d_model} wide, {model.n_heads} heads, context {model.context}"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


SECTIONS = {"text": text, "states": states, "copying": recall("copying"), "needle": recall("needle")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="the folder of all runs")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only {', '.join(unknown)}: give some of {', '.join(SECTIONS)}")
    for section in chosen:
        made = SECTIONS[section](options)
        print(made)
        write_section(options.document, section, f"{date.today():%-d %B %Y}. {made}")


if __name__ == "__main__":
    main()
