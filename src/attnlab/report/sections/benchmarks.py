"""Benchmarks: training steps and prefill."""

from __future__ import annotations

from typing import Any

from ...formatting import NONE, count, milliseconds, size, times
from ..findings import Findings, number
from ..html import Html, table, tag
from ..style import Look
from .common import Figures, frame, missing, named


def section(found: Findings, look: dict[str, Look], drawn: Figures) -> Html:
    kinds = {kind: [r for r in found.bench if r.kind == kind] for kind in ("train", "prefill")}
    said = (
        "the median of interleaved repeats after a warm-up; relative time is against the baseline at the same context."
    )
    names = {
        "train": ("Training step", f"One forward pass, backward pass and update: {said}"),
        "prefill": ("Prefill", f"Reading a whole prompt into the cache: {said}"),
    }
    content = [
        [tag("h3", names[k][0]), bench_table(records, look, names[k][1])] for k, records in kinds.items() if records
    ]
    return frame(
        "benchmarks",
        "Training and prefill speed",
        content or missing(found, "bench.json", "No training or prefill benchmark here"),
    )


def bench_table(records: list[Any], look: dict[str, Look], caption: str) -> Html:
    head = [
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
    rows = []
    for r in records:
        form = " ".join(filter(None, [r.mode, r.impl, r.dtype]))
        if r.error:
            rows.append(
                [named(r.mechanism, look), form, f"{r.context:,}", r.batch, tag("span", f"✗ {r.error}", class_="bad")]
                + [""] * 7
            )
            continue
        ends = [number(x) for x in r.ms_spread]
        between = f"{milliseconds(ends[0])} – {milliseconds(ends[1])}" if len(ends) == 2 else NONE
        rows.append(
            [
                named(r.mechanism, look),
                form,
                f"{r.context:,}",
                r.batch,
                milliseconds(number(r.ms)),
                between,
                count(number(r.tokens_per_s)),
                times(number(r.relative)),
                size(number(r.peak_bytes)),
                size(number(r.cache_bytes)),
                count(number(r.flops)),
                r.repeats,
            ]
        )
    return table(caption, head, rows, left=2)
