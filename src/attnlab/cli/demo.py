"""The command demo: compare eight mechanisms, and report."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from .. import presets
from ..comparison.engines import Share
from ..presets import COMPARED
from ..ranges import Count
from ..terminal import tables
from ..terminal.progress import working
from .options import progress, this_command

DEMO_SEEDS = 3  # fewer decide nothing
DEMO_STEPS = 300
DEMO_BENCH: dict[Literal["train", "prefill", "decode"], tuple[int, ...]] = {
    "train": (64,),
    "prefill": (256,),
    "decode": (64, 256, 1024),
}  # what is measured -> tokens per sequence


def demo(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = Path("demo"),
    jobs: Annotated[Count | None, arg(metavar="INT")] = None,
) -> int:
    """Compare eight mechanisms on Shakespeare, and report: 6 to 10 minutes on 2 cores.

    Args:
        out: Where runs, results and report.html go; what is finished there is kept.
        jobs: Runs side by side (as many as there are cores if left out).
    """
    from ..comparison.compare import compare
    from ..comparison.grid import Comparison
    from ..costs import bench as bench_module
    from ..files import write_json
    from ..report import write_report
    from ..terminal.comparison import table

    config = presets.get("quick")
    config = replace(config, train=replace(config.train, steps=DEMO_STEPS))
    comparison = Comparison(config, COMPARED, DEMO_SEEDS)
    found = compare(comparison, out, share=Share(jobs=jobs), command=this_command(), show=progress())
    measured = out / "bench.json"
    made = out / "samples.json"
    if not measured.exists() or measured.stat().st_mtime < made.stat().st_mtime:  # runs are newer than measurements
        records = []
        print("measuring speed and memory", file=sys.stderr)
        with working() as tell:
            for kind, contexts in DEMO_BENCH.items():
                records += bench_module.bench(
                    kind, config, COMPARED, contexts, timing=bench_module.Timing(5), progress=tell
                )
        write_json(measured, [r.to_dict() for r in records])
    page = write_report(out)
    tables.console().print(table(found), "", f"report: {page}", sep="\n", soft_wrap=True)
    return int(any(cell["status"] != "done" for cell in found["cells"]))
