"""The command heal: train a converted model, and show how it recovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from tyro.conf import Positional, arg

from ..errors import UserError
from ..formatting import known
from ..ranges import Count, Positive, Seed, Share, Size
from ..runs.launcher import rank
from ..terminal import tables
from .options import Flag, Json, this_command, train_and_tell


class Certified(TypedDict, total=False):
    """The fields of a conversion's certificate that are read."""

    model: str
    loss_before: float | None


def heal(
    source: Annotated[Positional[str], arg(metavar="DIR")],
    *,
    data: Annotated[str, arg(metavar="SOURCE")] = "shakespeare",
    steps: Count = 200,
    train: Literal["all", "attention", "new"] = "all",
    distill: Annotated[Share, arg(metavar="SHARE")] = 0.0,
    teacher: Annotated[str | None, arg(metavar="SOURCE")] = None,
    batch_size: Count = 12,
    context: Annotated[Count | None, arg(metavar="INT")] = None,
    lr: Positive = 3e-4,
    warmup: Size = 10,
    eval_every: Annotated[Count | None, arg(metavar="INT")] = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    seed: Seed = 0,
    out: Annotated[Path | None, arg(metavar="RUN")] = None,
    resume: Flag = False,
    json_: Json = False,
) -> int:
    """Train a converted model for a while, and show how it recovers by tokens.

    Args:
        source: The folder that attnlab convert wrote, or any trained model.
        data: What to train on: shakespeare, text:PATH, jsonl:PATH#FIELD, parquet:PATH#FIELD, prepared:DIR.
        steps: Optimizer steps.
        train: Everything, the attention layers, or of those what multi-head attention does not have.
        distill: The share of the objective, 0 to 1, that is agreement with the original instead of with the text.
        teacher: The original (what the certificate of DIR names if left out).
        batch_size: Sequences per step.
        context: Tokens per sequence (the model's context, at most 512, if left out).
        lr: The learning rate, which falls to a tenth.
        warmup: Steps in which it rises.
        eval_every: Steps between two points of the curve (a tenth of all if left out).
        precision: Of matrix products.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        seed: Of batches and dropout.
        out: The run folder (runs/DIR-healed if left out).
        resume: Go on from the newest checkpoint in the run folder.
        json_: Print the curve as JSON.
    """
    from dataclasses import replace

    from .. import pretrained
    from ..config import DataConfig, Execution, RunConfig, TrainConfig
    from ..files import alone, expanded, read_json, write_json
    from ..report.conversion import write_recovery
    from ..runs.folder import RunFolder

    folder = expanded(source)
    proof = folder / "certificate.json"
    certificate = read_json(proof, Certified, "convert the model again") if proof.is_file() else {}
    original = teacher or certificate.get("model", "")
    if teacher is not None and not distill:
        raise UserError(f"--teacher {teacher} teaches nothing while --distill is 0: give a share, or leave it out")
    if distill and not original:
        raise UserError(f"{source} does not say which model it was made from: name it with --teacher")
    loaded = pretrained.load(source)
    every = max(steps // 10, 1) if eval_every is None else eval_every
    own = loaded.tokenizer is not None and not data.startswith("prepared:")
    name = f"{folder.name}-healed"
    shape = loaded.model.config
    length = min(shape.context, 512) if context is None else context
    config = RunConfig(
        name=name,
        model=replace(shape, context=max(shape.context, length)),
        data=DataConfig(source=data, tokenizer=str(folder) if own else "auto"),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
            context=length,
            lr=lr,
            min_lr=lr / 10,
            warmup=warmup,
            precision=precision,
            train=train,
            distill=distill,
            eval_every=every,
            save_every=every,
            device=device,
        ),
        seed=seed,
        init=str(source),
        teacher=original if distill else "",
    )
    out = out or Path("runs") / name
    result = train_and_tell(config, out, name, resume, Execution())
    if result is None:
        return 0
    curve = [[r["tokens"], r["val_loss"]] for r in RunFolder.open(out).metrics() if "val_loss" in r]
    found = {"name": name, "curve": curve, "original": certificate.get("loss_before"), "command": this_command()}
    if rank() == 0:
        with alone(out, "trains in"):
            write_json(out / "recovery.json", found)
            write_recovery(out / "recovery.html", found)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        tables.console().print(tables.recovery(found))
        print(f"val loss {known(result.val_loss)} after {result.tokens:,} tokens, {out}")
    return 0
