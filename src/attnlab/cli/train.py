"""The command train: train one model in a run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import presets
from ..config import Execution, RunConfig
from ..errors import UserError
from ..formatting import known
from ..ranges import Positive
from ..runs.launcher import rank
from ..terminal import tables
from .options import Fields, Flag, Pack, listed, train_and_tell, with_choices


def train(
    preset: Annotated[Positional[str], arg(metavar="PRESET")],
    *,
    config: Fields,
    mechanism: Annotated[str | None, arg(metavar="NAME[,NAME]")] = None,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    pack: Pack | None = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    resume: Flag = False,
    strategy: str = "auto",
    recompute: Flag = False,
    track: Annotated[str | None, arg(metavar="A,B,...")] = None,
    peak: Annotated[Positive | None, arg(metavar="RATE")] = None,
    dry_run: Flag = False,
    flops: Annotated[Positive | None, arg(metavar="RATE")] = None,
) -> int:
    """Train one model and keep it in a run folder.

    In one process, or in as many as torchrun, accelerate or deepspeed starts.

    Args:
        preset: A complete run to start from; every field of it can be overridden below.
        mechanism: The attention of every layer, or one per layer, repeated: sliding,sliding,sliding,mla.
        data: "shakespeare", text:PATH (a UTF-8 file or a folder of them), jsonl:PATH#FIELD, parquet:PATH#FIELD,
            prepared:DIR (made by attnlab prepare), or a mixture: 0.7*prepared:A+0.3*text:B.
        pack: documents: rows hold whole documents, and attention stays inside each.
        out: The run folder (runs/PRESET-MECHANISM-sSEED if left out).
        resume: Go on from the newest checkpoint in the run folder, with any strategy and number of processes.
        strategy: Who holds what: single, ddp, fsdp, deepspeed, deepspeed:FILE.json (ddp where there are several
            processes, if left out).
        recompute: Keep only the inputs of layers for the backward pass: less memory, more work.
        track: Also write to tensorboard, wandb, trackio.
        peak: FLOPs per second of one device, such as 312e12, to which use is compared (known or measured if left out).
        dry_run: Train nothing; print parameters, tokens, FLOPs, cache and expected time.
        flops: For --dry-run: FLOPs per second, such as 100e12 (those of a matrix product here if left out).
    """
    config = with_choices(config, mechanism, data, pack)
    if dry_run:
        return foresee(preset, config, flops)
    if flops is not None:
        raise UserError("--flops is for --dry-run alone: give both or neither")
    presets.check_corpus(config)
    out = out or Path("runs") / f"{preset}-{config.mechanism}-s{config.seed}"
    how = Execution(strategy=strategy, recompute=recompute, track=tuple(listed("--track", track)), peak=peak)
    result = train_and_tell(config, out, f"{config.mechanism} s{config.seed}", resume, how)
    if result is not None and rank() == 0:
        loss = known(result.val_loss)
        rate = known(result.tokens_per_s, 0)
        print(f"val loss {loss} after {result.steps} steps, {rate} tokens/s, {out}")
        if result.mfu is not None:
            print(f"model FLOPs used: {result.mfu:.0%} of {result.peak}", file=sys.stderr)
        print(f"next: attnlab sample {out} --prompt 'ROMEO:'", file=sys.stderr)
    return 0


def foresee(preset: str, config: RunConfig, rate: float | None) -> int:
    """Print what `attnlab train --dry-run` does. Return the exit code."""
    from ..costs.dry_run import forecast
    from ..training.limits import resolve
    from ..training.schedule import cautions

    try:
        presets.check_corpus(config)
        config = resolve(config)[0]  # the vocabulary grows to that of the text, where it is there
        missing = ""
    except UserError as error:
        missing = f"\nTraining would stop here: {error}"
    print(f"{presets.about(preset)}\n")
    tables.console().print(tables.forecast_table(forecast(config, rate)))
    for caution in cautions(config.train):
        print(f"\nNote: {caution}.")
    print(missing, end="\n" if missing else "")
    return 0
