"""Numbers for people: sizes, counts, times, losses.

The report's page and the terminal write some of them differently; `where` says which. A value that is missing is None:
an en dash on the page, nothing in a table of the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

Where = Literal["page", "terminal"]
NONE = "–"


def size(value: float | None, where: Where = "page") -> str:
    """Return bytes in binary units: 1.03 MiB, at most GiB; on the terminal 1.0 MiB, at most TiB."""
    if value is None:
        return NONE if where == "page" else ""
    units = ["B", "KiB", "MiB", "GiB"]
    if where == "terminal":
        units.append("TiB")
    power = 0
    while abs(value) >= 1024 and power < len(units) - 1:
        value /= 1024
        power += 1
    if power == 0:
        return f"{value:.0f} B"
    digits = _three(value) if where == "page" else f"{value:.1f}"
    return f"{digits} {units[power]}"


def gigabytes(count: float) -> str:
    """Return bytes in decimal units, as GPUs are sold: 80 GB, 1.59 MB."""
    value = count / 1e9
    if value >= 100:
        return f"{value:,.0f} GB"
    return f"{value:.3g} GB" if value >= 1 else f"{count / 1e6:.3g} MB"


def count(value: float | None, where: Where = "page") -> str:
    """Return three digits of a number and a decimal prefix: 24.1 k, 671 G; on the terminal 24.1k, 671B."""
    if value is None:
        return NONE
    if where == "terminal":
        return _short(value)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{_three(value)} {unit}" if unit else f"{value:.3g}"


def _short(value: float) -> str:
    for power, unit in ((4, "T"), (3, "B"), (2, "M"), (1, "k")):
        if value >= 1000**power:
            return f"{value / 1000**power:.3g}{unit}"
    return f"{value:,.0f}"


def _three(value: float) -> str:
    """Return three significant digits. Trailing zeros stay, so that columns line up: 1.00, 24.1, 410."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def rate(tokens_per_s: float) -> str:
    """Return tokens per second for a line of progress: 24.1k tok/s."""
    shown = f"{tokens_per_s / 1000:.1f}k" if tokens_per_s >= 1000 else f"{tokens_per_s:.0f}"
    return f"{shown} tok/s"


def milliseconds(value: float | None, where: Where = "page") -> str:
    """Return a time in ms: 12.3, below a column's title; on the terminal with its unit, 12.3 ms."""
    if value is None:
        return NONE
    if where == "terminal":
        return f"{value:.3g} ms"
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def span(seconds: float) -> str:
    """Return a time in the largest unit that it fills: 1.6 years."""
    units = (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
    name, unit = next((pair for pair in units if seconds >= pair[1]), units[-1])
    return f"{seconds / unit:,.1f} {name}"


def clock(seconds: float) -> str:
    """Return a time as 1:05, or 2:01:05 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def loss(value: float | None) -> str:
    """Return a loss to four decimals."""
    return NONE if value is None else f"{value:.4f}"


def signed(value: float | None, digits: int = 4) -> str:
    """Return a difference with its sign; minus is a minus, not a hyphen."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def times(value: float | None) -> str:
    """Return a factor: 1.25×."""
    return NONE if value is None else f"{value:.2f}×"


def known(value: float | None, digits: int = 4) -> str:
    """Return a number for a sentence: 1,234.5000, or "unknown"."""
    return "unknown" if value is None else f"{value:,.{digits}f}"


def number(value: float) -> str:
    """Return a number with commas: whole numbers whole, others to one decimal."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def words(items: Iterable[str], last: str = "and") -> str:
    """Return items as "a, b and c"."""
    items = list(items)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


LAYER_TITLES = (
    "layer",
    "mechanism",
    "effective rank",
    "keys apart",
    "values apart",
    "top-k found",
    "gate",
    "expert load",
)


def remembered(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return what layers remember, as titles and rows of a table: the columns that any layer has, or ([], [])."""
    rows = []
    for layer in layers:
        rank = layer["effective_rank"]
        recall = layer["selection_recall"]
        load = layer["expert_load"]
        gate = [fmean(weights) for weights in zip(*layer["gate"], strict=True)]
        rows.append(
            [
                str(layer["layer"] + 1),
                layer["mechanism"],
                "" if rank is None else f"{rank:.1f} of {layer['rank']}",
                _apart(layer["key_angles"]),
                _apart(layer["value_angles"]),
                "" if recall is None else f"{recall:.2f}, by chance {layer['selection_chance']:.2f}",
                " ".join(f"{weight:.2f}" for weight in gate),
                f"{min(load):.2f} to {max(load):.2f}" if load else "",
            ]
        )
    shown = [i for i in range(len(LAYER_TITLES)) if any(row[i] for row in rows)]
    if len(shown) < 3:
        return [], []
    return [LAYER_TITLES[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _apart(angles: Sequence[Sequence[float]]) -> str:
    """Return the mean angle between the subspaces of different heads."""
    between = [angle for i, row in enumerate(angles) for angle in row[:i]]
    return f"{fmean(between):.0f}°" if between else ""


def escaped(text: str) -> str:
    """Return `text` with line breaks and other control characters written as escapes, as in names of files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parameter_difference(own: float | None, base: float | None) -> str:
    """Return how many more or fewer parameters a model has than its baseline, in words; "" where it is 1 % or less."""
    percent = 100 * (own - base) / base if own and base else 0.0
    if abs(percent) <= 1:
        return ""
    size = f"{abs(percent):.1f}" if abs(percent) < 10 else f"{abs(percent):,.0f}"
    return f"{size} % {'more' if percent > 0 else 'fewer'} parameters"


def about_signs(mechanisms: Sequence[str]) -> str:
    """Return the sentence about head scores of mechanisms whose weights have signs."""
    return (
        f"{', '.join(mechanisms)}: weights may be negative, and are divided by the sum of their sizes; a score below 0 "
        "is of a head that subtracts, and entropy and distance are those of the sizes."
    )
