"""What the terminal shows: tables that fit into 80 columns, and one line of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from .results import BenchRecord


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def columns(**kinds: str) -> Table:
    """A plain table; each column's kind is "left" or "right"."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, kind in kinds.items():
        table.add_column(title.replace("_", " "), justify=kind, no_wrap=True)  # type: ignore[arg-type]
    return table


def listing(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`attnlab list`: sizes, then words and formulas."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from .listing import SHAPE, TOKENS, number

    left, right = "left", "right"
    numbers = {"floats/token": right, f"cache at {TOKENS}": right, "parameters": right}
    sizes = columns(mechanism=left, **numbers, kernels=left, laws=left)
    words = Table(box=None, pad_edge=False, show_header=False)
    for r in records:
        name = f"[bold]{r['name']}"
        if "error" in r:
            words.add_row(name, f"[red]{escape(r['error'])}")
            continue
        cells = (number(r[key]) for key in ("floats_per_token", "floats_at_context", "parameters"))
        kernels = " ".join(kernel for kernel in r["impls"] if kernel != "reference")
        sizes.add_row(name, *cells, kernels, f"all but {len(r['breaks'])}" if r["breaks"] else "all")
        broken = f"\n[yellow]breaks these laws: {', '.join(r['breaks'])}[/]" if r["breaks"] else ""
        words.add_row(name, f"{escape(r['summary'])}\n[dim]{escape(r['formula'])}[/]{broken}")
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    note = (
        f"Sizes of one layer at GPT-2's width ({shape}); the cache in floats of one sequence. Kernels besides the "
        "reference. Laws as declared; attnlab audit NAME puts them to the test."
    )
    return Group(sizes, "", f"[dim]{note}", "", words)


def bench(records: Sequence[BenchRecord]) -> RenderableType:
    """`attnlab bench`: a row per record."""
    from rich.markup import escape

    left, right = "left", "right"
    table = columns(
        mechanism=left,
        context=right,
        ms=right,
        **{"tokens/s": right, "x mha": right},
        cache=right,
        peak=right,
        MFLOPs=right,
    )
    for r in records:
        name = f"[bold]{r.mechanism}[/]" + (f" {r.mode}" if r.mode else "")
        if r.error:
            table.add_row(name, str(r.context), f"[red]{escape(r.error)}")
            continue
        table.add_row(
            name,
            str(r.context),
            "" if r.ms is None else f"{r.ms:,.2f}",
            "" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}",
            "" if r.relative is None else f"{r.relative:.2f}",
            size(r.cache_bytes),
            size(r.peak_bytes),
            "" if r.flops is None else f"{r.flops / 1e6:,.1f}",
        )
    return table


def size(count: int | None) -> str:
    """Bytes, in words."""
    if count is None:
        return ""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """A line on a terminal that says what is being done; elsewhere nothing, and never anything on stdout."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda what, done, of: None
        return
    with screen.status("starting") as status:
        yield lambda what, done, of: status.update(f"{what} ({done}/{of})")
