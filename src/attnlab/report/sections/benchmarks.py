"""Benchmarks of training steps, and of prefill."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE, count, milliseconds, size, times
from ...results import BenchRecord
from ..html import Html, table, tag
from ..results_folder import Findings, finite_number
from ..style import Look
from .common import Figures, frame, missing, named

MEDIAN = "the median of interleaved repeats after a warm-up; relative time is against the baseline at the same context."
KINDS = {  # kind of a record -> title and caption of its table
    "train": ("Training step", f"One forward pass, backward pass and update: {MEDIAN}"),
    "prefill": ("Prefill", f"Reading a whole prompt into the cache: {MEDIAN}"),
}
HEAD = [
    "mechanism",
    "form",
    "context",
    "batch",
    "ms",
    "fastest – slowest",
    "tokens / s",
    "relative time",
    "peak memory",
    "live cache",
    "FLOPs",
    "repeats",
]


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    """Return the section; it has no figure."""
    content = []
    for kind, (title, caption) in KINDS.items():
        records = [r for r in found.bench if r.kind == kind]
        if records:
            content.append([tag("h3", title), bench_table(records, look, caption)])
    return frame(
        "benchmarks",
        "Training and prefill speed",
        content or missing(found, "bench.json", "No training or prefill benchmark here"),
    )


def bench_table(records: list[BenchRecord], look: dict[str, Look], caption: str) -> Html:
    """Return the table of these records; a row whose measurement failed says why."""
    return table(caption, HEAD, [_row(record, look) for record in records], left=2)


def _row(r: BenchRecord, look: dict[str, Look]) -> list[Any]:
    form = " ".join(filter(None, [r.mode, r.impl, r.dtype]))
    start = [named(r.mechanism, look), form, f"{r.context:,}", r.batch]
    if r.error:
        return [*start, tag("span", f"✗ {r.error}", class_="bad"), *[""] * 7]
    ends = [finite_number(x) for x in r.ms_spread]
    return [
        *start,
        milliseconds(finite_number(r.ms)),
        f"{milliseconds(ends[0])} – {milliseconds(ends[1])}" if len(ends) == 2 else NONE,
        count(finite_number(r.tokens_per_s)),
        times(finite_number(r.relative)),
        size(finite_number(r.peak_bytes)),
        size(finite_number(r.cache_bytes)),
        count(finite_number(r.flops)),
        r.repeats,
    ]
