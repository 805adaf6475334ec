"""The command infer: text from any trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from ..ranges import Count, NotNegative, Part, Seed, Size
from .options import Flag, Json

if TYPE_CHECKING:
    from ..inference.text import Samples

Compile = Annotated[Flag, arg(name="compile")]  # of a parameter compile_


def infer(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    prompt: UseAppendAction[list[str]] = [],  # noqa: B006 (tyro reads the default, nobody changes it)
    chat: Flag = False,
    system: Annotated[str | None, arg(metavar="TEXT")] = None,
    tokens: Count = 200,
    temperature: NotNegative = 0.8,
    top_k: Annotated[Count | None, arg(metavar="INT")] = None,
    top_p: Annotated[Part | None, arg(metavar="FLOAT")] = None,
    seed: Seed = 0,
    checkpoint: Annotated[Size | None, arg(metavar="STEP")] = None,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    compile_: Compile = False,
    device: str = "auto",
    trust: Flag = False,
    json_: Json = False,
) -> int:
    r"""Continue prompts, or answer in a chat, with any model, and say how fast.

    A text ends where the model says so, or after --tokens.

    Args:
        source: A run folder, an exported or a Hugging Face folder, nanoGPT's ckpt.pt, or a name on the hub.
        prompt: What to continue; give it several times for a batch. A line break if left out.
        chat: Each prompt is what a user says, in the form of the model's chat template.
        system: In a chat, what comes before it.
        tokens: How many tokens to add at most.
        temperature: 0 always takes the likeliest token; higher is wilder.
        top_k: Choose among this many likeliest tokens only.
        top_p: Choose among the likeliest tokens that together have this probability only.
        seed: The same seed gives the same text.
        checkpoint: A step that has a checkpoint, in a run folder; the newest if left out.
        dtype: Of weights and cache; "auto" is fp32 on a CPU and bf16 elsewhere.
        compile_: Run the layers through torch.compile: a minute of waiting, and what docs/performance.md shows.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        trust: Open a pickle that is more than tensors: it may run any code.
        json_: Print one JSON object at the end instead of the text.
    """
    import torch

    from .. import pretrained
    from ..device import find_device
    from ..inference.generate import Sampling
    from ..inference.text import continue_texts

    place = find_device(device)
    narrow = dtype == "bf16" or (dtype == "auto" and place.type != "cpu")
    kind = torch.bfloat16 if narrow else torch.float32
    loaded = pretrained.load(source, checkpoint=checkpoint, dtype=kind, device=place, trust=trust)
    prompts = prompt or ([] if chat else ["\n"])
    if compile_:
        print("compiling the layers once the prompt is read: up to a minute", file=sys.stderr)
    shown = [f"{text}\n" for text in prompts] if chat else prompts
    found = continue_texts(
        loaded,
        prompts,
        Sampling(tokens, temperature, top_k, top_p, seed),
        chatting=chat,
        system=system,
        compile=compile_,
        on_text=None if json_ or not shown else stream(shown[0]),
    )
    return show(found, shown, json_)


def stream(prompt: str) -> Callable[[int, str], None]:
    """Return a listener that prints the first text, after its prompt, as it comes; the other texts follow whole."""
    before = [prompt]  # empty once it is printed

    def tell(number: int, text: str) -> None:
        if number == 0:
            print((before.pop() if before else "") + text, end="", flush=True)

    return tell


def show(found: Samples, prompts: Sequence[str], as_json: bool) -> int:
    """Print the texts that were not streamed and the summary, or everything as JSON. Return the exit code."""
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    print()
    for prompt, text in zip(prompts[1:], found.texts[1:], strict=True):
        print(f"\n{'-' * 20}\n{prompt}{text}")
    print(summary(found), file=sys.stderr)
    return 0


def summary(found: Samples) -> str:
    """Return one line: the mechanism, the speed, the memory."""
    from ..measure.counters import read_speed

    made = found.mechanism if found.step is None else f"{found.mechanism}, step {found.step}"
    parts = [
        f"{made}, {found.dtype}: read {found.prompt_tokens} tokens at {found.prefill_tokens_per_s:,.0f} tokens/s",
        f"wrote {found.tokens}",
        f"live cache {found.cache_bytes:,} bytes",
    ]
    if found.decode_tokens_per_s is not None:
        parts[1] += f" at {found.decode_tokens_per_s:,.0f} tokens/s"
    if found.read_bytes_per_s is not None and found.device == "cpu":
        speed = read_speed()
        share = found.read_bytes_per_s / speed
        parts.append(f"{share:.0%} of the {speed / 1e9:.0f} GB/s that memory gives")
    return ", ".join(parts)
