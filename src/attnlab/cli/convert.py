"""The command convert: put another attention into a trained model, and certify the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..errors import UserError, quoted
from ..ranges import Count, Seed
from ..terminal import tables
from ..terminal.progress import working
from .options import Flag, Json, json_object, split_commas, this_command

if TYPE_CHECKING:
    from ..pretrained import Loaded


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    to: Annotated[str, arg(metavar="MECHANISM")],
    rank: Annotated[str | None, arg(metavar="N|SHARE")] = None,
    method: Annotated[str | None, arg(metavar="NAME")] = None,
    per_layer: Flag = False,
    drop_window: Flag = False,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    data: Annotated[str, arg(metavar="SOURCE")] = "shakespeare",
    calibrate: Count = 16,
    context: Annotated[Count | None, arg(metavar="INT")] = None,
    grid: Annotated[str | None, arg(metavar="SHARE,...")] = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    seed: Seed = 0,
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
        drop_window: Let layers that see a window become ones that see all tokens, which they were not trained for.
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
    from ..files import check_free, expanded, whole_folder, write_json

    folder = expanded(out or Path("converted") / f"{Path(source).name}-{to}")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something already: name a new folder with --out")
    check_free(folder)
    for name, value in (("--rank", rank), ("--method", method)):
        if grid is not None and value is not None:
            raise UserError(f"--grid tries shares of its own by every method: leave out {name}")
    loaded = pretrained.load(source)
    wish: dict[str, Any] = {"per_layer": per_layer, "options": json_object("--options", options), "seed": seed}
    wish["drop_window"] = drop_window
    shares = None if grid is None else [_rank("--grid", word) for word in split_commas(grid)]
    if shares == []:
        raise UserError(f"--grid is {quoted(grid)}: give shares of the cache, such as 0.5,0.25")
    with working() as tell:
        texts = _texts(loaded, data, calibrate, context, seed)
        if shares is not None:
            found = _grid(loaded, to, shares, {**texts, **wish}, tell)
        else:
            from ..convert import convert as run

            model, certificate = run(
                loaded.model, to, rank=_rank("--rank", rank), method=method, tell=tell, **texts, **wish
            )
            found = [certificate.to_dict()]
    if shares is None:
        from dataclasses import replace

        results = {"held-out loss before conversion": certificate.loss_before, "after": certificate.loss_after}
        told = found[0] | {"model": source, "command": this_command()}
        pretrained.save(replace(loaded, model=model), folder, results=results, more={"certificate.json": told})
    else:
        from ..report.conversion import write_grid

        with whole_folder(folder) as half:
            write_json(half / "certificates.json", found)
            write_grid(half / "report.html", found, this_command())
    if json_:
        print(json.dumps(found[0] if shares is None else found, indent=1))
    else:
        tables.console().print(tables.certificates(found))
    print(
        f"next: {f'attnlab heal {folder} --data {data}' if shares is None else folder / 'report.html'}", file=sys.stderr
    )
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
    """Batches for calibration, from the training part of the text, and to measure on, from the held-out part.

    Each window begins with the tokens that stand before every text.
    """
    import numpy as np
    import torch

    from ..config import DataConfig
    from ..data.order import spread_places
    from ..evaluation.perplexity import in_tokens

    if loaded.tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer, so it can read no text: put its tokenizer.json beside it")
    length, rows = min(loaded.model.config.context, 512) if context is None else context, 8
    first = torch.tensor([loaded.tokenizer.starts] * rows, dtype=torch.long)
    own = length - first.shape[1]  # tokens of the text in a window
    if own < 2:
        raise UserError(f"windows of {length} tokens hold {max(own, 0)} of the text: give --context {length - own + 2}")
    found = {}
    for name, split, count in (("calibration", "train", calibrate), ("held_out", "val", 8)):
        tokens, _ = in_tokens(DataConfig(source=data), split, loaded.tokenizer)
        room = len(tokens) - own
        if room < 1:
            raise UserError(f"{data} has {len(tokens)} tokens to use as {name} text, fewer than {own + 1}: give more")
        numbers = np.random.Generator(np.random.Philox(seed))
        even = spread_places(count * rows, room + 1)
        starts = even if split == "val" else numbers.integers(0, room, count * rows)
        found[name] = [torch.cat([first, batch], 1) for batch in tokens.gather(starts, own).split(rows)]
    return found


def _grid(loaded: Loaded, to: str, ranks: list[Any], given: dict[str, Any], tell: Any) -> list[dict[str, Any]]:
    """Certificates of every method of the target, and of mean pooling of heads, at each share of the cache."""
    from ..convert import convert as run
    from ..convert import pooling, targets

    methods = targets.module(to).METHODS
    ways = [(to, method) for method in methods] + ([] if "mean" in methods else [(pooling.TARGET, "mean")])
    found = []
    for number, (mechanism, method) in enumerate(ways):
        fields = given if mechanism == to else given | {"options": None, "per_layer": False}
        for at, rank in enumerate(ranks):
            tell(f"{mechanism}, {method}, {rank}", number * len(ranks) + at, len(ways) * len(ranks))
            found.append(run(loaded.model, mechanism, rank=rank, method=method, **fields)[1].to_dict())
    return found
