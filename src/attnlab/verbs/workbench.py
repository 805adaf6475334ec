"""The workbench: train, compare, bench, audit, report, demo, list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .. import presets, screen
from ..comparison.engines import Kind, Local, Ray, Slurm
from ..config import Execution, RunConfig
from ..errors import UserError, choose
from ..runs.launcher import rank
from .options import (
    Fields,
    Flag,
    Json,
    Pack,
    json_object,
    listed,
    options_of_mechanisms,
    shown,
    this_command,
    train_and_tell,
    whole,
    with_choices,
)

EIGHT = ("mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding")  # what is compared if nothing is said
DEMO_SEEDS = 2
DEMO_BENCH: dict[Literal["train", "prefill", "decode"], tuple[int, ...]] = {
    "train": (64,),
    "prefill": (256,),
    "decode": (64, 256, 1024),
}  # and the tokens per sequence


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
    peak: Annotated[float | None, arg(metavar="RATE")] = None,
    dry_run: Flag = False,
    flops: Annotated[float | None, arg(metavar="RATE")] = None,
) -> int:
    """Train one model and keep it in a run folder.

    In one process, or in as many as torchrun, accelerate or deepspeed starts.

    Args:
        preset: A complete run to start from; every field of it can be overridden below.
        mechanism: The attention of every layer, or one per layer, repeated: sliding,sliding,sliding,mla.
        data: "shakespeare", text:PATH (a UTF-8 file or a folder of them), prepared:DIR (made by attnlab prepare), or a
            mixture: 0.7*prepared:A+0.3*text:B.
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
    how = Execution(strategy=strategy, recompute=recompute, track=tuple(listed(track or "")), peak=peak)
    result = train_and_tell(config, out, f"{config.mechanism} s{config.seed}", resume, how)
    if result is not None and rank() == 0:
        loss, rate = shown(result.val_loss), shown(result.tokens_per_s, 0)
        print(f"val loss {loss} after {result.steps} steps, {rate} tokens/s, {out}")
        if result.mfu is not None:
            print(f"model FLOPs used: {result.mfu:.0%} of {result.peak}", file=sys.stderr)
        print(f"next: attnlab sample {out} --prompt 'ROMEO:'", file=sys.stderr)
    return 0


def foresee(preset: str, config: RunConfig, rate: float | None) -> int:
    """`attnlab train --dry-run`."""
    from ..costs.dry_run import forecast
    from ..training.train import resolve

    if rate is not None and not 0 < rate < float("inf"):
        raise UserError(f"--flops is {rate}: give FLOPs per second, such as 100e12")
    try:
        presets.check_corpus(config)
        config = resolve(config)[0]  # the vocabulary grows to that of the text, where it is there
        missing = ""
    except UserError as error:
        missing = f"\nTraining would stop here: {error}"
    print(f"{presets.about(preset)}\n")
    screen.console().print(screen.forecast(forecast(config, rate)))
    print(missing, end="\n" if missing else "")
    return 0


def compare(
    preset: Annotated[Positional[str], arg(metavar="PRESET")] = "quick",
    *,
    config: Fields,
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(EIGHT),
    tasks: Annotated[str | None, arg(metavar="A,B,...")] = None,
    seeds: int = 3,
    sizes: Annotated[str | None, arg(metavar="LxD,...")] = None,
    match: Literal["params", "cache", "none"] = "none",
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    pack: Pack | None = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    engine: Annotated[str, arg(metavar="local|ray|slurm")] = "local",
    jobs: Annotated[int | None, arg(metavar="INT")] = None,
    threads: Annotated[int | None, arg(metavar="INT")] = None,
    gpus: Annotated[int | None, arg(metavar="INT")] = None,
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
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        data: "shakespeare", text:PATH (a UTF-8 file or a folder of them), prepared:DIR (made by attnlab prepare), or a
            mixture: 0.7*prepared:A+0.3*text:B.
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
    from ..comparison import compare as comparison
    from ..comparison.extras import EXTRAS
    from ..comparison.grid import sweep
    from ..data.tasks import TASKS
    from ..terminal.comparison import table

    config = with_choices(config, None, data, pack)
    presets.check_corpus(config)
    kinds: dict[str, Kind] = {"local": Local(), "ray": Ray(ray_address), "slurm": slurm}
    kind = kinds[choose("engine", engine, kinds)]
    for name, other in kinds.items():
        if other is not kind and other != type(other)():
            raise UserError(
                f"there are options of {name}, and the engine is {engine}: add --engine {name}, or drop them"
            )
    out = out or Path("compare") / preset
    what: dict[str, Any] = {
        "sizes": listed(sizes or ""),
        "tasks": [presets.get(choose("task", name, TASKS)) for name in listed(tasks or "")],
        "options": options_of_mechanisms("--options", options),
    }
    share: dict[str, Any] = {"jobs": jobs, "threads": threads, "gpus": gpus}
    if dry_run:
        work = sweep(config, listed(mechanisms), seeds, out, match, **what)
        print(comparison.foresee(work, out, kind, share | {"device": config.train.device}))
        return 0
    found = comparison.compare(
        config,
        listed(mechanisms),
        seeds,
        out,
        match,
        **what,
        **share,
        engine=kind,
        command=this_command(),
        extras=(*EXTRAS, "heads") if heads else EXTRAS,
        quiet=json_,
    )
    if json_:
        print(json.dumps(found, indent=1))
    else:
        screen.console().print(table(found))
        print(f"next: attnlab report {out}", file=sys.stderr)
    cells = [cell for part in (found, *found["sizes"], *found["tasks"]) for cell in part["cells"]]
    return int(any(cell["status"] != "done" for cell in cells))


def bench(
    kind: Annotated[Positional[Literal["train", "prefill", "decode"]], arg(metavar="train|prefill|decode")],
    *,
    config: Fields,
    preset: Annotated[str, arg(metavar="PRESET")] = "quick",
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(EIGHT),
    context: Annotated[str | None, arg(metavar="N,...")] = None,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    batch: Annotated[int | None, arg(metavar="INT")] = None,
    repeats: int = 7,
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
    for name in listed(mechanisms):
        parameters(variant(config, name, given).model)  # refuses what does not fit together before anything is measured
    lengths = None if context is None else [whole("--context", word) for word in listed(context)]
    with screen.working() as tell:
        records = bench_module.bench(
            kind,
            config,
            listed(mechanisms),
            lengths,
            options=given,
            batch=batch,
            repeats=repeats,
            progress=tell,
        )
    if json_:
        print(json.dumps([r.to_dict() for r in records], indent=1))
    else:
        crossovers = context_crossovers(records)
        screen.console().print(screen.bench(records), *map(str, crossovers), sep="\n")
    return 0


def audit(
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    *,
    kwargs: Annotated[str | None, arg(metavar="JSON")] = None,
    config: Annotated[str | None, arg(metavar="JSON")] = None,
    call: Annotated[str | None, arg(metavar="EXPRESSION")] = None,
    mask: Literal["additive", "keep", "drop"] = "additive",
    mask_shape: Literal["auto", "2d", "4d"] = "auto",
    d_model: Annotated[int | None, arg(metavar="INT")] = None,
    laws: Annotated[str | None, arg(metavar="LAW,...")] = None,
    json_: Json = False,
) -> int:
    """Put the laws to a mechanism, or to anyone's attention class.

    Exit code: 0 all laws hold, 1 one is broken, 2 it could not run.

    Args:
        target: A mechanism's name, FILE.py:CLASS, or PACKAGE.MODULE:CLASS.
        kwargs: The arguments of the class: '{"embed_dim": 64, "num_heads": 4}'.
        config: The attributes of the one config object that the class takes; for a mechanism, fields of its Config.
        call: How to call it, for example 'module(x, attention_mask=mask)'; found out if left out.
        mask: What the mask in --call holds: 0 and -inf to add, True where a token may be seen, True where it may not.
        mask_shape: 2d is [T T], 4d is [B 1 T T].
        d_model: The width of its input, where its arguments do not tell.
        laws: Only these.
        json_: Print one JSON object.
    """
    from ..audit import audit_target

    found = audit_target(
        target,
        kwargs=json_object("--kwargs", kwargs),
        config=json_object("--config", config),
        call=call,
        mask=mask,
        mask_shape=mask_shape,
        d_model=d_model,
        laws=None if laws is None else listed(laws),
    )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        screen.console().print(found)
    return found.exit_code


def report(folder: Annotated[Positional[Path], arg(metavar="DIR")]) -> int:
    """Write DIR/report.html, one file that opens offline.

    Args:
        folder: Where compare or demo left its results.
    """
    from ..report import write_report

    print(write_report(folder))
    return 0


def demo(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = Path("demo"),
    jobs: Annotated[int | None, arg(metavar="INT")] = None,
) -> int:
    """Compare eight mechanisms on Shakespeare, and report: 6 minutes on 2 cores.

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
    found = comparison.compare(config, EIGHT, DEMO_SEEDS, out, jobs=jobs, command=this_command())
    measured, made = out / "bench.json", out / "samples.json"
    if not measured.exists() or measured.stat().st_mtime < made.stat().st_mtime:  # runs are newer than measurements
        records = []
        print("measuring speed and memory", file=sys.stderr)
        with screen.working() as tell:
            for kind, contexts in DEMO_BENCH.items():
                records += bench_module.bench(kind, config, EIGHT, contexts, repeats=5, progress=tell)
        write_json(measured, [r.to_dict() for r in records])
    page = write_report(out)
    screen.console().print(table(found), "", f"report: {page}", sep="\n", soft_wrap=True)
    return int(any(cell["status"] != "done" for cell in found["cells"]))


def list_(
    *,
    json_: Json = False,
    markdown: Flag = False,
) -> int:
    """Show every mechanism: formula, floats per token, parameters, laws, kernels.

    Args:
        json_: Print a JSON list.
        markdown: Print the table of docs/mechanisms.md.
    """
    from .. import catalogue

    records = catalogue.listing()
    if json_:
        print(json.dumps(records, indent=1))
    elif markdown:
        print(catalogue.markdown([r for r in records if r.get("package") == "attnlab"]), end="")
    else:
        screen.console().print(screen.listing(records))
    return 0
