"""The command heads: what each attention head attends to and is needed for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from .. import presets
from ..errors import UserError, need
from ..ranges import Count, Seed, Size
from ..terminal import tables
from ..terminal.progress import working
from .options import Flag, Json, whole_numbers


def heads(
    source: Annotated[Positional[str], arg(metavar="RUN|MODEL")],
    *,
    sequences: Count = 64,
    segments: Annotated[str | None, arg(metavar="N,...")] = None,
    checkpoint: Annotated[Size | None, arg(metavar="STEP")] = None,
    no_ablation: Flag = False,
    emergence: Flag = False,
    untrained: Flag = False,
    seed: Seed = 0,
    device: str = "auto",
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    png: Annotated[Path | None, arg(metavar="DIR")] = None,
    json_: Json = False,
) -> int:
    """Show what each head attends to and is needed for, with two null distributions.

    Args:
        source: A run folder, an exported or Hugging Face folder, a name on the hub; with --untrained, a preset.
        sequences: Random sequences per length; 64 or more give marks that mean something.
        segments: Lengths of the repeated segment (up to half of the context, at most 128, if left out).
        checkpoint: A step of a run folder; the newest if left out.
        no_ablation: Leave out the causal part, which runs the model once per head.
        emergence: Also score every checkpoint that the run kept (train with --train.keep 0).
        untrained: Look at a freshly initialised model of a preset's shape; without it, weights must come from a file.
        seed: Of the random tokens.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        out: Write everything to this JSON file.
        png: Write the figures as PNG files into this folder, which is new or empty.
        json_: Print everything as one JSON object instead of tables.
    """
    lengths = whole_numbers("--segments", segments, Count)
    if not untrained and source in presets.names() and not Path(source).exists():
        raise UserError(
            f"{source!r} is a preset, not a trained model: give a run folder, or add --untrained to look at its "
            "random initial weights"
        )
    if emergence and untrained:
        raise UserError("an untrained model has no checkpoints: leave out --emergence or --untrained")
    from ..files import check_free, check_target, write_json

    if out is not None:
        check_target(out)
    if png is not None:
        check_free(png)
        need("matplotlib", "figures")
    need("scipy", "stats")
    from ..device import find_device
    from ..heads import whole

    model = (_fresh(source, seed) if untrained else _loaded(source, checkpoint)).to(find_device(device))
    with working() as tell:
        found = {"source": source, "untrained": untrained} | whole(
            model,
            run=source if emergence else None,
            sequences=sequences,
            segments=lengths,
            seed=seed,
            causal=not no_ablation,
            tell=tell,
        )
    if out is not None:
        write_json(out, found)
    if png is not None:
        from ..heads.png import write_pngs

        write_pngs(found, png)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        tables.console().print(tables.heads(found))
    return 0


def _fresh(preset: str, seed: int) -> Any:
    import torch

    from ..model import Decoder

    torch.manual_seed(seed)
    return Decoder(presets.get(preset).model).eval()


def _loaded(source: str, checkpoint: int | None) -> Any:
    from .. import pretrained

    return pretrained.load(source, checkpoint=checkpoint).model
