"""Numbers and words for people: sizes, counts, times, losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any


def short(count: float) -> str:
    """Three digits of a number, and how large it is: 671B."""
    for power, unit in ((4, "T"), (3, "B"), (2, "M"), (1, "k")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g}{unit}"
    return f"{count:,.0f}"


def gigabytes(count: float) -> str:
    value = count / 1e9
    return f"{value:,.0f} GB" if value >= 100 else f"{value:.3g} GB" if value >= 1 else f"{count / 1e6:.3g} MB"


def span(seconds: float) -> str:
    """A time in the largest unit that it fills."""
    units = (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
    name, unit = next((pair for pair in units if seconds >= pair[1]), units[-1])
    return f"{seconds / unit:,.1f} {name}"


def clock(seconds: float) -> str:
    """ "1:05", or "2:01:05" from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# Numbers. Missing is an en dash; minus is a minus.

NONE = "–"


def loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def signed(value: float | None, digits: int = 4) -> str:
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{_three(value)} {unit}"


def count(value: float | None) -> str:
    """Three digits and a decimal prefix: 24.1 k."""
    if value is None:
        return NONE
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{_three(value)} {unit}" if unit else f"{value:.3g}"


def _three(value: float) -> str:
    """Three significant digits, trailing zeros kept so that columns line up: 1.00, 24.1, 410."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def words(items: Iterable[str], last: str = "and") -> str:
    """a, b and c."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


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
    """What layers remember, as titles and rows of a table, without the columns that none of them has; or nothing."""
    rows = []
    for layer in layers:
        rank, recall, load = layer["effective_rank"], layer["selection_recall"], layer["expert_load"]
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
    """Between the subspaces of different heads, on average."""
    between = [angle for i, row in enumerate(angles) for angle in row[:i]]
    return f"{fmean(between):.0f}°" if between else ""
