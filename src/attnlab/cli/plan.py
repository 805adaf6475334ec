"""The command plan: what training and decoding take on GPUs that are not here."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Annotated

from tyro.conf import Positional, arg

from ..ranges import Count, Part, Positive
from ..terminal import tables
from ..terminal.plan import table
from ..terminal.progress import working
from .options import Fields, Flag, Json, json_object, options_of_mechanisms, split_commas, with_choices


def plan(
    preset: Annotated[Positional[str], arg(metavar="PRESET")],
    *,
    config: Fields,
    mechanism: Annotated[str | None, arg(metavar="NAME[,NAME]")] = None,
    mechanisms: Annotated[str | None, arg(metavar="A,B,...")] = None,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    gpus: Annotated[Count, arg(metavar="N")] = 1,
    gpu: Annotated[str, arg(metavar="NAME")] = "h100",
    strategy: Annotated[str, arg(metavar="NAME")] = "ddp",
    batch: Annotated[Count | None, arg(metavar="N")] = None,
    recompute: Flag = False,
    tokens: Annotated[Positive | None, arg(metavar="N")] = None,
    mfu: Annotated[Part | None, arg(metavar="SHARE")] = None,
    context: Annotated[Count | None, arg(metavar="N")] = None,
    json_: Json = False,
) -> int:
    """Say what training and decoding will take on GPUs that are not here.

    Exit code: 0 training fits, 1 it does not, and what would is said.

    Args:
        preset: The shape and the run; every field of it can be overridden below.
        mechanism: The attention of every layer, or one per layer, repeated: sliding,sliding,sliding,mla.
        mechanisms: What else is planned in this shape, a row each (every mechanism if left out; none: '').
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        gpus: How many.
        gpu: h100, h200, a100, mi300, or its numbers: '{"memory": 80e9, "flops": 989e12, "bandwidth": 3.35e12}'.
        strategy: ddp (everything on each GPU), fsdp (all sharded), deepspeed[:FILE.json] (by its ZeRO stage).
        batch: Sequences on each GPU at a time (the preset's train.batch_size if left out).
        recompute: Keep only the input of each layer, and compute the rest twice.
        tokens: To train on, such as 300e9 (the preset's if left out).
        mfu: The share of the peak that training reaches (0.4 if left out).
        context: Tokens held while decoding (the preset's context if left out).
        json_: Print one JSON object.
    """
    from .. import attention
    from ..costs.plan import MFU, Machine
    from ..costs.plan import plan as plans
    from ..measure.gpus import find_gpu
    from ..presets import variant

    numbers = json_object("--gpu", gpu) if gpu.lstrip().startswith("{") else None
    machine = Machine(find_gpu(gpu if numbers is None else numbers), gpus, strategy, batch, recompute)
    config = with_choices(config, mechanism, None)
    given = options_of_mechanisms("--options", options)
    left_out = partial(print, "attnlab:", file=sys.stderr)
    labels = attention.usable(left_out) if mechanisms is None else split_commas(mechanisms)
    foresee = partial(plans, machine=machine, tokens=tokens, mfu=MFU if mfu is None else mfu, context=context)
    with working() as tell:
        tell(config.mechanism, 0, 1 + len(labels))
        own = foresee(config)
        rows = []
        for number, label in enumerate(labels, 1):
            tell(label, number, 1 + len(labels))
            rows.append(foresee(variant(config, label, given), advise=False))
    if json_:
        print(json.dumps({**own.to_dict(), "mechanisms": [row.to_dict() for row in rows]}, indent=1))
    else:
        tables.console().print(table(own, rows))
    return int(not own.fits)
