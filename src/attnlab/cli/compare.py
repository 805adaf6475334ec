"""The command compare: train mechanisms with paired seeds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from .. import presets
from ..comparison.engines import EngineOptions, Local, Ray, Share, Slurm
from ..contrasts import MARGIN, Intervals, Judging
from ..errors import UserError, choose
from ..ranges import Count, Positive, Runs, Size, Threads
from ..terminal import tables
from .options import (
    Fields,
    Flag,
    Json,
    Pack,
    listed,
    options_of_mechanisms,
    progress,
    split_commas,
    this_command,
    with_choices,
)


def compare(
    preset: Annotated[Positional[str], arg(metavar="PRESET")] = "quick",
    *,
    config: Fields,
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(presets.COMPARED),
    tasks: Annotated[str | None, arg(metavar="A,B,...")] = None,
    seeds: Runs = 3,
    sizes: Annotated[str | None, arg(metavar="LxD,...")] = None,
    match: Literal["params", "cache", "none"] = "none",
    intervals: Intervals = "auto",
    margin: Annotated[Positive, arg(metavar="NATS")] = MARGIN,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    pack: Pack | None = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    engine: Annotated[str, arg(metavar="local|ray|slurm")] = "local",
    jobs: Annotated[Count | None, arg(metavar="INT")] = None,
    threads: Annotated[Threads | None, arg(metavar="INT")] = None,
    gpus: Annotated[Size | None, arg(metavar="INT")] = None,
    ray_address: Annotated[str, arg(metavar="ADDRESS")] = "local",
    slurm: Slurm = Slurm(),  # noqa: B008
    dry_run: Flag = False,
    heads: Flag = False,
    json_: Json = False,
) -> int:
    """Train mechanisms with paired seeds, and say what can be told apart.

    The same command goes on where it stopped, failed, or was killed.

    Args:
        preset: The run that all share; every field of it can be overridden below.
        mechanisms: What to compare, the baseline mha among them; a hybrid is written sliding+sliding+mla.
        tasks: Also train and examine all on synthetic tasks: mqar, induction, repeats, copying, selective, needle.
        seeds: Runs per mechanism: seeds S, S+1, ... from --seed. Three or more give intervals that mean something.
        sizes: Compare at each of these sizes: LAYERSxWIDTH such as 2x64,4x128, with heads of the preset's size;
            LAYERSxWIDTHxHEADS counts them.
        match: Solve the free width so that all have equal parameters, or equal caches, within 1 %.
        intervals: pooled: the spread of all runs and Dunnett's correction; pairwise: each mechanism's own pairs; auto:
            pooled where the runs allow it, else pairwise. compare.json has both.
        margin: A difference that does not matter, in nats: within it mechanisms are equal.
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        data: "shakespeare", text:PATH (a UTF-8 file or a folder of them), jsonl:PATH#FIELD, parquet:PATH#FIELD,
            prepared:DIR (made by attnlab prepare), or a mixture: 0.7*prepared:A+0.3*text:B.
        pack: documents: rows hold whole documents, and attention stays inside each.
        out: Where runs and results go (compare/PRESET if left out); finished runs in it are kept.
        engine: Where runs are made: in processes here, as tasks on Ray, or as jobs of Slurm.
        jobs: Runs side by side (as many as there are cores or GPUs here; on Ray and Slurm, as many as they allow).
        threads: CPU threads of each run (here, the cores shared out; on Ray and Slurm, 1).
        gpus: GPUs of each run on Ray and Slurm (1 unless --train.device is cpu; on Ray, where it has any).
        ray_address: local starts Ray here, for as long as the comparison takes; auto or HOST:PORT joins a cluster.
        slurm: How jobs are submitted. Ctrl-C leaves them alone.
        dry_run: Train nothing; show the runs there would be, and for Slurm the batch file.
        heads: Also look inside the heads of every run; with --train.keep 0, at every checkpoint.
        json_: Print compare.json instead of the table.
    """
    from ..comparison import compare as comparing
    from ..comparison.extras import EXTRAS
    from ..comparison.grid import Comparison
    from ..data.tasks import TASKS
    from ..terminal.comparison import table

    config = with_choices(config, None, data, pack)
    presets.check_corpus(config)
    kinds: dict[str, EngineOptions] = {"local": Local(), "ray": Ray(ray_address), "slurm": slurm}
    kind = kinds[choose("engine", engine, kinds)]
    for name, other in kinds.items():
        if other is not kind and other != type(other)():
            raise UserError(
                f"there are options of {name}, and the engine is {engine}: add --engine {name}, or drop them"
            )
    out = out or Path("compare") / preset
    comparison = Comparison(
        preset=config,
        mechanisms=split_commas(mechanisms),
        seeds=seeds,
        match=match,
        sizes=listed("--sizes", sizes),
        tasks=[presets.get(choose("task", name, TASKS)) for name in listed("--tasks", tasks)],
        options=options_of_mechanisms("--options", options),
        judging=Judging(intervals, margin),
    )
    share = Share(jobs=jobs, threads=threads, gpus=gpus)
    if dry_run:
        print(comparing.foresee(comparison, out, kind, share))
        return 0
    found = comparing.compare(
        comparison,
        out,
        engine=kind,
        share=share,
        command=this_command(),
        extras=(*EXTRAS, "heads") if heads else EXTRAS,
        show=progress(quiet=json_),
    )
    if json_:
        print(json.dumps(found, indent=1))
    else:
        tables.console().print(table(found))
        print(f"next: attnlab report {out}", file=sys.stderr)
    cells = [cell for part in (found, *found["sizes"], *found["tasks"]) for cell in part["cells"]]
    return int(any(cell["status"] != "done" for cell in cells))
