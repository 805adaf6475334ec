"""The command export: write a trained model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..ranges import Size
from ..terminal.progress import working
from .options import Flag


def export(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    out: Annotated[Path, arg(metavar="DIR")],
    family: Annotated[str, arg(metavar="FAMILY")] = "attnlab",
    checkpoint: Annotated[Size | None, arg(metavar="STEP")] = None,
    results: Annotated[Path | None, arg(metavar="EVAL.JSON")] = None,
    trust: Flag = False,
) -> int:
    """Write a trained model as a folder that transformers loads, with a model card.

    Args:
        source: A run folder, an exported or a Hugging Face folder, a name on the hub, or nanoGPT's ckpt.pt.
        out: The folder to write.
        family: attnlab, which can say everything, or gpt2, llama, mistral, qwen2, qwen3 where the model is one.
        checkpoint: A step that has a checkpoint; the newest if left out.
        results: What attnlab eval --out wrote, for the model card.
        trust: Open a pickle, which can run code that it brings.
    """
    from .. import pretrained
    from ..files import check_free, expanded, read_json

    check_free(expanded(out))
    known = None if results is None else read_json(results, dict, "give what attnlab eval --out wrote")
    with working() as tell:
        tell(f"reading {source}", 0, 2)
        loaded = pretrained.load(source, checkpoint=checkpoint, trust=trust)
        tell(f"writing {out}", 1, 2)
        pretrained.save(loaded, out, family=family, results=known)
    print(out)
    return 0
