"""convert and heal: another attention in a trained model, and training that mends what it lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from .. import screen
from ..errors import UserError
from .options import Flag, Json, json_object, listed, shown, this_command, train_and_tell

if TYPE_CHECKING:
    from ..pretrained import Loaded


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    to: Annotated[str, arg(metavar="MECHANISM")],
    rank: Annotated[str | None, arg(metavar="N|SHARE")] = None,
    method: Annotated[str | None, arg(metavar="NAME")] = None,
    per_layer: Flag = False,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    data: Annotated[str, arg(metavar="SOURCE")] = "shakespeare",
    calibrate: int = 16,
    context: Annotated[int | None, arg(metavar="INT")] = None,
    grid: Annotated[str | None, arg(metavar="SHARE,...")] = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    seed: int = 0,
    json_: Json = False,
) -> int:
    """Put another attention into a trained model, and certify what that did to it.

    Args:
        source: A run folder, an exported or a Hugging Face folder, or a name on the Hugging Face hub.
        to: gqa, mqa, mla, msla, mka, fast_mka or sliding.
        rank: The width of the new attention (latent, heads or window), or a share of the old cache such as 0.5; the
            widest, at which least is lost, if left out.
        method: svd or aware (weighted by calibration text) for latents; mean, aligned or first for heads.
        per_layer: Share the same total of ranks among the layers by singular-value energy.
        options: Further fields of the mechanism's Config: '{"top_k": 64}'.
        data: The text: its training part calibrates, its held-out part is measured.
        calibrate: Batches of calibration text, of 8 sequences each.
        context: Tokens per sequence of it (the model's context, at most 512, if left out).
        grid: Convert at each of these shares by every method, and write OUT/report.html instead of a model.
        out: Where the model and its certificate go (converted/NAME-MECHANISM if left out).
        seed: Of what the source has no counterpart for.
        json_: Print the certificate as JSON.
    """
    from .. import pretrained
    from ..files import write_json

    loaded = pretrained.load(source)
    folder = out or Path("converted") / f"{Path(source).name}-{to}"
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something already: name a new folder with --out")
    wish: dict[str, Any] = {"per_layer": per_layer, "options": json_object("--options", options), "seed": seed}
    with screen.working() as tell:
        texts = _texts(loaded, data, calibrate, context, seed)
        if grid is not None:
            found = _grid(loaded, to, [_rank("--grid", word) for word in listed(grid)], {**texts, **wish}, tell)
        else:
            from ..convert import convert as run

            model, certificate = run(
                loaded.model, to, rank=_rank("--rank", rank), method=method, tell=tell, **texts, **wish
            )
            found = [certificate.to_dict()]
    if grid is None:
        from dataclasses import replace

        results = {"held-out loss before conversion": certificate.loss_before, "after": certificate.loss_after}
        pretrained.save(replace(loaded, model=model), folder, results=results)
        write_json(folder / "certificate.json", found[0] | {"model": source, "command": this_command()})
    else:
        from ..report.conversion import write_grid

        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "certificates.json", found)
        write_grid(folder / "report.html", found, this_command())
    if json_:
        print(json.dumps(found if grid else found[0], indent=1))
    else:
        screen.console().print(screen.certificates(found))
    print(f"next: {folder / 'report.html' if grid else f'attnlab heal {folder} --data {data}'}", file=sys.stderr)
    return 0


def heal(
    source: Annotated[Positional[str], arg(metavar="DIR")],
    *,
    data: Annotated[str, arg(metavar="SOURCE")] = "shakespeare",
    steps: int = 200,
    train: Literal["all", "attention", "new"] = "all",
    distill: Annotated[float, arg(metavar="SHARE")] = 0.0,
    teacher: Annotated[str | None, arg(metavar="SOURCE")] = None,
    batch_size: int = 12,
    context: Annotated[int | None, arg(metavar="INT")] = None,
    lr: float = 3e-4,
    warmup: int = 10,
    eval_every: Annotated[int | None, arg(metavar="INT")] = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    seed: int = 0,
    out: Annotated[Path | None, arg(metavar="RUN")] = None,
    resume: Flag = False,
    json_: Json = False,
) -> int:
    """Train a converted model for a while, and show how it recovers by tokens.

    Args:
        source: The folder that attnlab convert wrote, or any trained model.
        data: What to train on: shakespeare, text:PATH, prepared:DIR.
        steps: Optimizer steps.
        train: Everything, the attention layers, or of those what multi-head attention does not have.
        distill: The share of the objective, 0 to 1, that is agreement with the original instead of with the text.
        teacher: The original (what the certificate of DIR names if left out).
        batch_size: Sequences per step.
        context: Tokens per sequence (the model's if left out).
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
    from ..files import read_json, write_json
    from ..report.conversion import write_recovery
    from ..runs.folder import RunFolder

    folder = Path(source).expanduser()
    certificate = read_json(folder / "certificate.json") if (folder / "certificate.json").is_file() else {}
    original = teacher or certificate.get("model", "")
    if distill and not original:
        raise UserError(f"{source} does not say which model it was made from: name it with --teacher")
    loaded = pretrained.load(source)
    every = eval_every or max(steps // 10, 1)
    own = loaded.tokenizer is not None and not data.startswith("prepared:")
    name = f"{folder.name}-healed"
    config = RunConfig(
        name=name,
        model=loaded.model.config if context is None else replace(loaded.model.config, context=context),
        data=DataConfig(source=data, tokenizer=str(folder) if own else "auto"),
        train=TrainConfig(
            steps=steps,
            batch_size=batch_size,
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
    write_json(out / "recovery.json", found)
    write_recovery(out / "recovery.html", found)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        screen.console().print(screen.recovery(found))
        print(f"val loss {shown(result.val_loss)} after {result.tokens:,} tokens, {out}")
    return 0


def _rank(option: str, text: str | None) -> int | float | None:
    """ "64" is a width, "0.5" a share."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UserError(f"{option} {text!r} is no rank: give a whole number, or a share such as 0.5") from None


def _texts(loaded: Loaded, data: str, calibrate: int, context: int | None, seed: int) -> dict[str, Any]:
    """Batches for calibration, from the training part of the text, and to measure on, from the held-out part."""
    import numpy as np
    import torch

    from ..config import DataConfig
    from ..evaluation.perplexity import in_tokens

    if loaded.tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer, so it can read no text: put its tokenizer.json beside it")
    length, rows = context or min(loaded.model.config.context, 512), 8
    found = {}
    for name, split, count in (("calibration", "train", calibrate), ("held_out", "val", 8)):
        tokens, _ = in_tokens(DataConfig(source=data), split, loaded.tokenizer)
        room = len(tokens) - length
        if room < 1:
            raise UserError(f"{data} has {len(tokens)} tokens to use as {name} text, fewer than {length}: give more")
        numbers = np.random.Generator(np.random.Philox(seed))
        even = np.linspace(0, room, count * rows).astype(np.int64)
        starts = even if split == "val" else numbers.integers(0, room, count * rows)
        found[name] = list(torch.as_tensor(tokens.gather(starts, length)).split(rows))
    return found


def _grid(loaded: Loaded, to: str, ranks: list[Any], given: dict[str, Any], tell: Any) -> list[dict[str, Any]]:
    """Certificates of every method of the target, and of mean pooling, at each share of the cache."""
    from ..convert import convert as run
    from ..convert import targets

    methods = targets.module(to).METHODS
    ways = [(to, method) for method in methods] + ([] if "mean" in methods else [("gqa", "mean")])
    found = []
    for number, (mechanism, method) in enumerate(ways):
        fields = given if mechanism == to else given | {"options": None, "per_layer": False}
        for at, rank in enumerate(ranks):
            tell(f"{mechanism}, {method}, {rank}", number * len(ranks) + at, len(ways) * len(ranks))
            found.append(run(loaded.model, mechanism, rank=rank, method=method, **fields)[1].to_dict())
    return found
