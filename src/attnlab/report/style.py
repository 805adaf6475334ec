"""Colours, markers and dashes: one look for one mechanism in every figure and table.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every mechanism also has a marker and a dash of
its own. Each colour is a pair: on white, on black.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..attention import declared
from .html import Html, tag

INK = ("#1d1d1b", "#efece6")
MUTED = ("#62605b", "#a5a29b")
RULE = ("#e4e1da", "#35353a")
GROUND = ("#ffffff", "#17171a")

PALETTE = (
    ("#1d1d1b", "#efece6"),  # black, white
    ("#0072b2", "#3c9be0"),  # blue
    ("#d55e00", "#f0803c"),  # vermillion
    ("#009e73", "#1fbf90"),  # green
    ("#c06a99", "#e39ac4"),  # purple
    ("#dc9400", "#f2b134"),  # orange
    ("#41a0db", "#8ecdf5"),  # sky
    ("#968700", "#f0e442"),  # yellow
    ("#8a8781", "#8d8a84"),  # grey
)
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
FREE = (4, 3, 6, 2, 5, 1, 7, 8)  # colours for mechanisms without a swatch, in this order
GLYPHS = {  # the markers again, for legends drawn in HTML: SVG paths around (0, 0)
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "square": "M-3.6 -3.6h7.2v7.2h-7.2z",
    "diamond": "M0 -5L5 0L0 5L-5 0z",
    "triangle-up": "M0 -4.6L4.6 3.6H-4.6z",
    "triangle-down": "M0 4.6L4.6 -3.6H-4.6z",
    "cross": "M-1.6 -4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "x": "M-4.4 -2.4L-2.4 -4.4L0 -2L2.4 -4.4L4.4 -2.4L2 0L4.4 2.4L2.4 4.4L0 2L-2.4 4.4L-4.4 2.4L-2 0z",
    "star": "M0 -5.4L1.4 -1.8L5.2 -1.7L2.2 .7L3.2 4.4L0 2.3L-3.2 4.4L-2.2 .7L-5.2 -1.7L-1.4 -1.8z",
    "pentagon": "M0 -4.8L4.6 -1.5L2.8 3.9H-2.8L-4.6 -1.5z",
    "hexagon": "M4.6 0L2.3 4H-2.3L-4.6 0L-2.3 -4H2.3z",
}
STROKES = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2.5 1.5 2.5"}


@dataclass(frozen=True)
class Look:
    """The colour, marker and dash of one mechanism."""

    slot: int  # of its colour in PALETTE
    marker: str
    dash: str

    @property
    def color(self) -> str:
        """The colour on white."""
        return PALETTE[self.slot][0]

    @property
    def band(self) -> str:
        """The colour of a band behind a line."""
        return veil(self.color)


def looks(mechanisms: Iterable[str]) -> dict[str, Look]:
    """Return the look of each mechanism. One whose Config has a `swatch` always looks the same.

    Others, such as hybrids, take the colours that are free, and in the end share colours, not shapes.
    """
    swatches = {mechanism: _swatch_of(mechanism) for mechanism in mechanisms}
    taken = {own[0] for own in swatches.values() if own}
    free = [slot for slot in FREE if slot not in taken] or [FREE[-1]]
    declared_looks = {own for own in swatches.values() if own}
    spare = (look for look in _others(free) if look not in declared_looks)
    places = {mechanism: own or next(spare) for mechanism, own in swatches.items()}
    return {mechanism: Look(slot, MARKERS[m], DASHES[d]) for mechanism, (slot, m, d) in places.items()}


def _others(free: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield looks for mechanisms that declare none: colour, marker and dash, without end."""
    for i in itertools.count():
        yield free[i % len(free)], (len(MARKERS) - 1 - i) % len(MARKERS), (2 + i // len(free)) % len(DASHES)


def _swatch_of(mechanism: str) -> tuple[int, int, int] | None:
    """Return the colour, marker and dash that a Config declares; None where it declares none that exist."""
    own = declared(mechanism, "swatch")
    limits = (len(PALETTE), len(MARKERS), len(DASHES))
    if not (isinstance(own, tuple) and len(own) == len(limits)):
        return None
    places = zip(own, limits, strict=True)
    return own if all(isinstance(place, int) and 0 <= place < limit for place, limit in places) else None


def veil(color: str, share: float = 0.14) -> str:
    """Return a colour of this opacity, to lay over others."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share:g})"


def dark() -> dict[str, str]:
    """Return colour on white -> colour on black, for every colour that figures use."""
    pairs = dict((*PALETTE, INK, MUTED, RULE, GROUND))
    return pairs | {veil(light, share): veil(dim, share) for light, dim in PALETTE for share in (0.07, 0.14)}


def variables() -> tuple[str, str]:
    """Return the colours as CSS variables: for the light theme, and for the dark one."""
    named = {f"c{slot}": pair for slot, pair in enumerate(PALETTE)}
    named |= {"ink": INK, "muted": MUTED, "rule": RULE, "ground": GROUND}
    light, dim = (";".join(f"--{name}:{pair[side]}" for name, pair in named.items()) for side in (0, 1))
    return light, dim


def swatch(look: Look) -> Html:
    """Return a short piece of the mechanism's line with its marker, as SVG."""
    line = tag("path", d="M1 7H25", stroke_width=2, stroke_dasharray=STROKES[look.dash] or None, fill="none")
    mark = tag("path", d=GLYPHS[look.marker], transform="translate(13 7)", fill=f"var(--c{look.slot})", stroke="none")
    return tag(
        "svg", line, mark, class_="swatch", viewBox="0 0 26 14", stroke=f"var(--c{look.slot})", aria_hidden="true"
    )
