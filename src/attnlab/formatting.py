"""Numbers and words for people: sizes, counts, times, losses."""

from __future__ import annotations

from collections.abc import Iterable


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
