"""The command bench: measure speed, memory and FLOPs."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..presets import COMPARED
from ..ranges import Count
from ..terminal import tables
from ..terminal.progress import working
from .options import Fields, Json, options_of_mechanisms, split_commas, whole_numbers


def bench(
    kind: Annotated[Positional[Literal["train", "prefill", "decode"]], arg(metavar="train|prefill|decode")],
    *,
    config: Fields,
    preset: Annotated[str, arg(metavar="PRESET")] = "quick",
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(COMPARED),
    context: Annotated[str | None, arg(metavar="N,...")] = None,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    batch: Annotated[Count | None, arg(metavar="INT")] = None,
    repeats: Count = 7,
    json_: Json = False,
) -> int:
    """Measure speed, memory and FLOPs, side by side, after checking the outputs.

    Args:
        kind: One training step, reading a prompt, or one more token.
        preset: The shape to measure; every field of it can be overridden below.
        mechanisms: What to measure; times are also given relative to mha where it is among them.
        context: Tokens per sequence, or tokens held while decoding (the preset's context if left out).
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        batch: Sequences at once (the preset's for training, else 1).
        repeats: Each time is the median of this many, taken in turns.
        json_: Print the records as a JSON list.
    """
    from ..costs import bench as bench_module
    from ..costs.crossover import context_crossovers
    from ..model import parameters
    from ..presets import variant

    given = options_of_mechanisms("--options", options)
    for name in split_commas(mechanisms):
        parameters(variant(config, name, given).model)  # refuses what does not fit together before anything is measured
    lengths = whole_numbers("--context", context, Count)
    with working() as tell:
        records = bench_module.bench(
            kind,
            config,
            split_commas(mechanisms),
            lengths,
            options=given,
            batch=batch,
            timing=bench_module.Timing(repeats),
            progress=tell,
        )
    if json_:
        print(json.dumps([r.to_dict() for r in records], indent=1))
    else:
        crossovers = context_crossovers(records)
        tables.console().print(tables.bench_table(records), *map(str, crossovers), sep="\n")
    return 0
