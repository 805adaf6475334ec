"""attnlab demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from .. import presets
from ..presets import COMPARED
from ..terminal import tables
from ..terminal.progress import working
from .options import this_command

DEMO_SEEDS = 2
DEMO_BENCH: dict[Literal["train", "prefill", "decode"], tuple[int, ...]] = {
    "train": (64,),
    "prefill": (256,),
    "decode": (64, 256, 1024),
}  # and the tokens per sequence


def demo(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = Path("demo"),
    jobs: Annotated[int | None, arg(metavar="INT")] = None,
) -> int:
    """Compare eight mechanisms on Shakespeare, and report: 6 minutes on 2 cores, 10 with AVX2 alone.

    Args:
        out: Where runs, results and report.html go; what is finished there is kept.
        jobs: Runs side by side (as many as there are cores if left out).
    """
    from ..comparison import compare as comparison
    from ..costs import bench as bench_module
    from ..files import write_json
    from ..report import write_report
    from ..terminal.comparison import table

    config = presets.get("quick")
    found = comparison.compare(config, COMPARED, DEMO_SEEDS, out, jobs=jobs, command=this_command())
    measured, made = out / "bench.json", out / "samples.json"
    if not measured.exists() or measured.stat().st_mtime < made.stat().st_mtime:  # runs are newer than measurements
        records = []
        print("measuring speed and memory", file=sys.stderr)
        with working() as tell:
            for kind, contexts in DEMO_BENCH.items():
                records += bench_module.bench(kind, config, COMPARED, contexts, repeats=5, progress=tell)
        write_json(measured, [r.to_dict() for r in records])
    page = write_report(out)
    tables.console().print(table(found), "", f"report: {page}", sep="\n", soft_wrap=True)
    return int(any(cell["status"] != "done" for cell in found["cells"]))
