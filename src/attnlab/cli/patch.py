"""The command patch: put another attention into a model of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..errors import UserError, choose
from ..ranges import Seed, Size
from ..terminal.progress import working
from .options import Flag, json_object, whole_numbers


def patch(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    mechanism: Annotated[str | None, arg(metavar="NAME")] = None,
    preset: Annotated[str | None, arg(metavar="PATCH")] = None,
    layers: Annotated[str | None, arg(metavar="N,...")] = None,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    keep_output: Flag = False,
    train: Literal["all", "attention", "new"] = "all",
    drop_window: Flag = False,
    seed: Seed = 0,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    dry_run: Flag = False,
) -> int:
    """Put another attention into a GPT-2, Llama, Mistral or Qwen of transformers.

    Prints how many parameters train, of how many.

    Args:
        source: A Hugging Face folder, or a name on the Hugging Face hub; with --dry-run, a model type such as gpt2 too.
        mechanism: What to put in; attnlab list shows them.
        preset: A published patch, instead of a mechanism and its options: published-msla.
        layers: Which layers, from 0; all if left out.
        options: Fields of the mechanism's Config: '{"kv_rank": 32}'.
        keep_output: Let the model's own output projection follow the mechanism's.
        train: What is not frozen: all, the mechanisms put in, or only what did not carry over into them.
        drop_window: Let a mechanism that sees all tokens replace layers that see a window.
        seed: Of the new weights.
        out: The folder to write.
        dry_run: Only count, on shapes without weights.
    """
    from ..presets import PATCHES

    if (mechanism is None) == (preset is None):
        raise UserError("give a --mechanism or a --preset, one of the two")
    settings: dict[str, Any] = {"seed": seed, "drop_window": drop_window}
    if layers is not None:
        settings["layers"] = whole_numbers("--layers", layers, Size)
    if preset is not None:
        settings |= PATCHES[choose("preset", preset, PATCHES)]
    else:
        given = json_object("--options", options)
        settings |= {"mechanism": mechanism, "options": given, "keep_output": keep_output, "train": train}
    from ..hf import folder  # only now: transformers takes seconds to import

    if dry_run:
        folder.dry_run(source, **settings)
        return 0
    if out is None:
        raise UserError("give the folder to write as --out DIR, or --dry-run to count only")
    with working() as tell:
        folder.patch_folder(source, out, progress=tell, **settings)
    print(f"written to {out}; load it after 'import attnlab.hf'", file=sys.stderr)
    return 0
