"""The command eval: how well a trained model predicts text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..ranges import Count, Size
from ..terminal import tables
from ..terminal.progress import working
from .options import Flag, Json


def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    *,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    split: Literal["val", "test", "train"] = "val",
    context: Annotated[Count | None, arg(metavar="INT")] = None,
    stride: Annotated[Count | None, arg(metavar="INT")] = None,
    batch_size: Count = 8,
    checkpoint: Annotated[Size | None, arg(metavar="STEP")] = None,
    device: str = "auto",
    trust: Flag = False,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    json_: Json = False,
) -> int:
    """Loss per token, perplexity and bits per byte of a model, on held-out text.

    Args:
        model: A run folder, an exported or a Hugging Face folder, nanoGPT's ckpt.pt, or a name on the Hugging Face hub.
        data: text:PATH, jsonl:PATH#FIELD, parquet:PATH#FIELD, prepared:DIR or shakespeare; what a run was trained on if
            left out.
        split: The part of the text; what was trained on only if you say so.
        context: The longest window, in tokens (the model's if left out).
        stride: How far a window ends from the one before it, in tokens; fewer show more of the past (the context if
            left out).
        batch_size: Windows side by side; it changes the speed and nothing else.
        checkpoint: A step that has a checkpoint; the newest if left out.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        trust: Open a pickle that is more than tensors: it may run any code.
        out: A JSON file to write the result to as well.
        json_: Print one JSON object.
    """
    from ..files import check_target, write_json

    if out is not None:
        check_target(out)
    from ..evaluation.perplexity import Rolling, evaluate_source

    with working() as tell:
        found = evaluate_source(
            model,
            data,
            split,
            rolling=Rolling(context, stride, batch_size),
            checkpoint=checkpoint,
            device=device,
            trust=trust,
            progress=tell,
        )
    if out is not None:
        write_json(out, found.to_dict())
    if found.split == "train":
        print("this is what the model was trained on, not held out", file=sys.stderr)
    if found.seen:
        print(f"{found.seen:.0%} of the passages looked for are in its training part", file=sys.stderr)
    if found.bytes is None:
        print(
            "bits per byte are not known: the tokenizer does not know some of this text, and how long that was is not "
            "on record; prepare the text again, in more than one document",
            file=sys.stderr,
        )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        tables.console().print(tables.evaluation(found))
    return 0
