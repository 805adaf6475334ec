"""The command sample: text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ..ranges import Count, NotNegative, Part, Seed, Size
from .infer import show, stream
from .options import Json


def sample(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    prompt: UseAppendAction[list[str]] = [],  # noqa: B006 (tyro reads the default, nobody changes it)
    tokens: Count = 200,
    temperature: NotNegative = 0.8,
    top_k: Annotated[Count | None, arg(metavar="INT")] = None,
    top_p: Annotated[Part | None, arg(metavar="FLOAT")] = None,
    seed: Seed = 0,
    checkpoint: Annotated[Size | None, arg(metavar="STEP")] = None,
    device: str = "auto",
    json_: Json = False,
) -> int:
    r"""Continue a prompt with a trained model, as it decodes.

    Args:
        run: A run folder: the --out of attnlab train.
        prompt: What to continue; give it several times for a batch. A line break if left out.
        tokens: How many tokens to add.
        temperature: 0 always takes the likeliest token; higher is wilder.
        top_k: Choose among this many likeliest tokens only.
        top_p: Choose among the likeliest tokens that together have this probability only.
        seed: The same seed gives the same text.
        checkpoint: A step that has a checkpoint; the newest if left out.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        json_: Print one JSON object at the end instead of the text.
    """
    from ..inference.generate import Sampling
    from ..inference.text import sample_run

    sampling = Sampling(tokens, temperature, top_k, top_p, seed)
    prompts = prompt or ["\n"]
    tell = None if json_ else stream(prompts[0])
    found = sample_run(run, prompts, sampling, checkpoint=checkpoint, device=device, on_text=tell)
    return show(found, found.prompts, json_)
